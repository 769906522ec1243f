"""Counts over Python source text, for `code_metrics`: comments, long functions, types, settings.

Every function takes parsed source and returns or yields what it found; nothing is imported, so
that code of any age can be counted.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LONG_FUNCTION = 60

# Tools read these comments, not people.
PRAGMA = re.compile(r"#\s*(fmt|type|noqa|ruff|mypy|pragma)\b\s*(:|$)")
SKIPPED_FORMAT = re.compile(r"#\s*fmt:\s*skip\b")

# Models that hold data or whole sections rather than settings, and so are exempt from descriptions.
NOT_SETTINGS = frozenset({"CommandSettings", "Manifest"})
MODEL_BASES = frozenset({"BaseModel", "BaseSettings"})

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTION_NODES = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class SourceFile:
    """One parsed file; `name` is its path below the measured root."""

    name: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def package(self) -> str:
        return self.name.split("/", 1)[0]


def read_sources(root: Path, packages: Sequence[str]) -> Iterator[SourceFile]:
    """Parse every Python file of the packages that exist, in a fixed order."""
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(root).as_posix()
            yield SourceFile(name, text, ast.parse(text, filename=name))


def comments_of(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each comment and whether it has its line to itself.

    The tokenizer tells comments from strings that contain `#`.
    """
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string, not token.line[: token.start[1]].strip()


def comment_lines(text: str) -> int:
    """Count lines that are comments for people, without pragmas."""
    return sum(alone and not PRAGMA.match(comment) for comment, alone in comments_of(text))


def skipped_formats(text: str) -> int:
    """Count statements that the formatter is told to leave alone."""
    return sum(bool(SKIPPED_FORMAT.search(comment)) for comment, _ in comments_of(text))


def long_functions(source: SourceFile) -> Iterator[str]:
    """Name the functions over `LONG_FUNCTION` lines, nested ones too, without decorators."""
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTION_NODES):
            length = line_count(node)
            if length > LONG_FUNCTION:
                yield f"{source.name}:{node.lineno} {node.name} ({length} lines)"


def line_count(node: FunctionNode) -> int:
    end = node.end_lineno
    assert end is not None
    return end - node.lineno + 1


def public_annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the annotations of a module's public signatures.

    They are those of parameters and returns of public functions and of public methods of public
    classes, and those of public fields in class bodies. Dunder methods belong to a class's public
    side.
    """
    for node in tree.body:
        if isinstance(node, FUNCTION_NODES) and is_public(node.name):
            yield from signature_annotations(node)
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            yield from class_annotations(node)


def class_annotations(node: ast.ClassDef) -> Iterator[ast.expr]:
    for item in node.body:
        if isinstance(item, FUNCTION_NODES) and (is_public(item.name) or is_dunder(item.name)):
            yield from signature_annotations(item)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if is_public(item.target.id):
                yield item.annotation
        elif isinstance(item, ast.ClassDef) and is_public(item.name):
            yield from class_annotations(item)


def signature_annotations(node: FunctionNode) -> Iterator[ast.expr]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]

    yield from (argument.annotation for argument in every if argument.annotation is not None)
    if node.returns is not None:
        yield node.returns


def is_public(name: str) -> bool:
    return not name.startswith("_")


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def last_name(node: ast.AST) -> str:
    """Return `Any` for both `Any` and `typing.Any`; an empty string for anything but a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return ""


def unquoted(annotation: ast.expr) -> Iterator[ast.AST]:
    """Walk an annotation, through the quotes of forward references too."""
    for node in ast.walk(annotation):
        yield node
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                yield from ast.walk(ast.parse(node.value, mode="eval"))
            except SyntaxError:
                continue  # a string inside Literal or Annotated, not a type


def count_any(annotation: ast.expr) -> int:
    return sum(last_name(node) == "Any" for node in unquoted(annotation))


def count_array_any(annotation: ast.expr) -> int:
    """Count `NDArray[Any]`: an array of any dtype, where `Any` is the usual spelling."""
    return sum(
        isinstance(node, ast.Subscript)
        and last_name(node.value) in {"NDArray", "dtype"}
        and last_name(node.slice) == "Any"
        for node in unquoted(annotation)
    )


def count_dict_any(annotation: ast.expr) -> int:
    return sum(is_dict_any(node) for node in unquoted(annotation))


def is_dict_any(node: ast.AST) -> bool:
    if not isinstance(node, ast.Subscript) or last_name(node.value) not in {"dict", "Dict"}:
        return False
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
    return [last_name(part) for part in parts] == ["str", "Any"]


def settings_fields(sources: Sequence[SourceFile]) -> Iterator[tuple[str, bool]]:
    """Yield (`file: Class.field`, whether it is described) for each declared setting.

    Settings are the public fields of pydantic models, found by the names of their base classes
    across files. A field that a model inherits counts once, where it is declared. A description
    is a `description=` in the field's value or annotation, or a string on the line below it.
    """
    classes = {
        node.name: (source, node)
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
    }

    def is_model(name: str, seen: frozenset[str] = frozenset()) -> bool:
        if name in MODEL_BASES:
            return True
        if name in NOT_SETTINGS or name not in classes or name in seen:
            return False
        bases = classes[name][1].bases
        return any(is_model(last_name(base), seen | {name}) for base in bases)

    for name, (source, node) in classes.items():
        if is_model(name):
            for target, described in model_fields(node):
                yield f"{source.name}: {name}.{target}", described


def model_fields(node: ast.ClassDef) -> Iterator[tuple[str, bool]]:
    following: list[ast.stmt | None] = [*node.body[1:], None]
    for item, below in zip(node.body, following, strict=True):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if not is_public(item.target.id) or "ClassVar" in ast.unparse(item.annotation):
            continue
        yield item.target.id, has_description(item) or is_string(below)


def has_description(item: ast.AnnAssign) -> bool:
    return any(
        keyword.arg == "description" and not is_empty_string(keyword.value)
        for node in ast.walk(item)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    )


def is_string(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def is_empty_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value in {"", None}


def hasattr_hooks(source: SourceFile) -> Iterator[str]:
    """Name the calls of `hasattr`, except those that ask an imported module what it offers."""
    modules = set(imported_modules(source.tree))
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call) or last_name(node.func) != "hasattr":
            continue
        if last_name(node.args[0]) not in modules:
            yield f"{source.name}:{node.lineno} {ast.unparse(node)}"


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)


def getattr_defaults(tree: ast.Module) -> int:
    """Count `getattr(x, "name", default)` on anything but an imported module."""
    modules = set(imported_modules(tree))
    return sum(
        isinstance(node, ast.Call)
        and last_name(node.func) == "getattr"
        and len(node.args) == 3
        and isinstance(node.args[1], ast.Constant)
        and last_name(node.args[0]) not in modules
        for node in ast.walk(tree)
    )
