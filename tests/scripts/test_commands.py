"""What a user sees.

Every refusal is one line with file and remedy and the right exit code, and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts import build_zarr, export_summary, inspect_zarr, verify_zarr
from scripts._command import run
from warehouse import Warehouse

Outcome = tuple[int, dict[str, Any] | None, str]
Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a script's main as its command line would: (exit code, result, last line of stderr)."""
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def call(script: Any, *argv: str) -> Outcome:
        try:
            code = run(script.main, script.Settings, script.__doc__, argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        lines = out.strip().splitlines()
        return (
            code,
            json.loads(lines[-1]) if lines else None,
            err.strip().splitlines()[-1] if err.strip() else "",
        )

    return call


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    ).save(path, quality=90)


def voc(path: Path, boxes: list[tuple[Any, Any, Any, Any]], name: str = "cell") -> None:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>\n"
        for a, b, c, d in boxes
    )
    path.write_text(
        f"<annotation><size><width>40</width><height>30</height></size>\n{objects}</annotation>"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six good VOC pictures."""
    root = tmp_path / "pictures"
    for at in range(6):
        picture(root / f"p{at}.jpg", at)
        voc(root / f"p{at}.xml", [(2, 3, 20, 25), (10, 5, 30, 20)])
    return root


def build(command: Command, folder: Path, *flags: str) -> Outcome:
    root = folder.parent / "root"
    return command(
        build_zarr,
        "--build.input_root",
        str(folder),
        "--build.output_root",
        str(root),
        "--build.workers",
        "0",
        "--build.target_size",
        "[32, 32]",
        *flags,
    )


def nothing_published(folder: Path) -> bool:
    root = folder.parent / "root"
    return not root.exists() or not [
        path for path in root.iterdir() if path.name == "CURRENT" or path.name.startswith("v")
    ]


def test_a_good_folder_builds_is_found_again_and_cleared(command: Command, folder: Path) -> None:
    code, result, last = build(command, folder)
    assert code == 0
    assert result is not None
    assert (result["found"], result["kept"], result["rejected"]) == (6, 6, 0)
    assert "next: python -m scripts" in last
    again = build(command, folder)[1]
    assert again is not None
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    cleared = build(command, folder, "--build.if_exists", "clear")[1]
    assert cleared is not None
    assert cleared["digest"] == result["digest"]


def test_the_trace_goes_to_the_file_that_the_environment_names(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = folder.parent / "logs" / "trace.jsonl"
    monkeypatch.setenv("WAREHOUSE_TRACE", str(trace))
    code, result, _ = build(command, folder)
    assert code == 0
    assert result is not None
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert lines
    assert all("seconds" in line or "decode" in line for line in lines)
    assert not (Path(result["path"]) / "trace.jsonl").exists()
    assert Warehouse.open(result["path"]).version == result["version"]


def test_a_trace_that_cannot_be_written_is_refused_before_the_build(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAREHOUSE_TRACE", str(folder))
    code, _, last = build(command, folder)
    assert code == 1
    assert "the trace is to be a file" in last
    assert nothing_published(folder)


def test_a_dry_run_says_what_would_be_and_writes_nothing(command: Command, folder: Path) -> None:
    code, result, last = build(command, folder, "--build.dry_run")
    assert code == 0
    assert result is not None
    assert (result["found"], result["kept"]) == (6, 6)
    assert result["bytes"] > 0
    assert "nothing was written" in last
    assert not (folder.parent / "root").exists()


def cut(folder: Path) -> None:
    os.truncate(folder / "p3.jpg", 400)


def blank(folder: Path) -> None:
    os.truncate(folder / "p3.jpg", 0)


def mislabelled(folder: Path) -> None:
    (folder / "p3.jpg").write_text("this is no picture, whatever its name says" * 20)


def broken_xml(folder: Path) -> None:
    (folder / "p3.xml").write_text("<annotation>\n<object>\n</annotation>")


def entity_bomb(folder: Path) -> None:
    (folder / "p3.xml").write_text(
        '<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]><annotation>&z;</annotation>'
    )


@pytest.mark.parametrize(
    "damage", [cut, blank, mislabelled, broken_xml, entity_bomb], ids=lambda f: f.__name__
)
def test_an_unusable_picture_or_annotation_is_named_with_the_flag_that_allows_it(
    command: Command, folder: Path, damage: Callable[[Path], None]
) -> None:
    damage(folder)
    code, result, last = build(command, folder)
    assert (code, result) == (1, None)
    assert last.startswith("error: ")
    assert "p3" in last
    assert "--build.max_invalid 1" in last
    assert nothing_published(folder)
    code, result, _ = build(command, folder, "--build.max_invalid", "1")
    assert code == 0
    assert result is not None
    assert (result["found"], result["kept"], result["rejected"]) == (6, 5, 1)
    lines = [
        json.loads(line)
        for line in (Path(result["path"]) / "rejected.jsonl").read_text().splitlines()
    ]
    assert [line["kind"] for line in lines] == ["picture"]


BAD_BOXES = {
    "nan": ("nan", 1, 20, 20),
    "reversed": (20, 20, 5, 5),
    "outside": (100, 100, 120, 130),
    "zero_area": (5, 5, 5, 20),
}


@pytest.mark.parametrize("kind", BAD_BOXES)
def test_a_bad_box_is_dropped_counted_and_listed(command: Command, folder: Path, kind: str) -> None:
    voc(folder / "p2.xml", [(2, 3, 20, 25), BAD_BOXES[kind]])
    code, result, _ = build(command, folder)
    assert code == 0
    assert result is not None
    lines = [
        json.loads(line)
        for line in (Path(result["path"]) / "rejected.jsonl").read_text().splitlines()
    ]
    assert [(line["kind"], line["reason"], Path(line["path"]).stem) for line in lines] == [
        ("box", kind, "p2")
    ]
    assert Warehouse.open(result["path"]).manifest.summary["all"]["dropped"] == {kind: 1}


def test_a_picture_of_bad_boxes_only_counts_as_invalid(command: Command, folder: Path) -> None:
    voc(folder / "p2.xml", [(20, 20, 5, 5)])
    code, _, last = build(command, folder)
    assert code == 1
    assert "max_invalid" in last
    assert "p2" in last


def test_an_unknown_class_is_listed_when_the_classes_are_fixed(
    command: Command, folder: Path
) -> None:
    voc(folder / "p2.xml", [(2, 3, 20, 25)], name="alien")
    code, _, last = build(command, folder, "--build.classes", '["cell"]')
    assert code == 1
    assert "p2" in last


def test_a_missing_annotation_is_named_with_the_flags_that_allow_it(
    command: Command, folder: Path
) -> None:
    (folder / "p1.xml").unlink()
    code, _, last = build(command, folder)
    assert code == 1
    assert "p1" in last
    assert "max_missing" in last
    assert build(command, folder, "--build.max_missing", "1")[0] == 0
    kept = build(
        command,
        folder,
        "--build.missing_is_empty",
        "true",
        "--build.max_empty_ratio",
        "0.5",
        "--build.max_missing",
        "1",
    )[1]
    assert kept is not None
    assert kept["kept"] == 6


def test_an_annotation_without_its_picture_is_named(command: Command, folder: Path) -> None:
    (folder / "p1.jpg").unlink()
    code, _, last = build(command, folder)
    assert code == 1
    assert "p1.xml" in last
    assert "max_missing" in last


def test_too_many_boxes_names_the_picture_and_the_number_needed(
    command: Command, folder: Path
) -> None:
    voc(folder / "p4.xml", [(at, at, at + 9, at + 9) for at in range(20)])
    code, _, last = build(command, folder)
    assert code == 1
    assert "p4" in last
    assert "--build.max_boxes 20" in last
    assert build(command, folder, "--build.too_many_boxes", "truncate")[0] == 0


def test_too_many_empty_pictures_are_refused(command: Command, folder: Path) -> None:
    voc(folder / "p4.xml", [])
    code, _, last = build(command, folder)
    assert code == 1
    assert "max_empty_ratio" in last


def test_no_pictures_names_the_folder_and_what_was_looked_for(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    code, _, last = build(command, tmp_path / "pictures")
    assert code == 1
    assert str(tmp_path / "pictures") in last
    assert ".jpg" in last


def test_no_input_root_says_which_flag(command: Command) -> None:
    code, _, last = command(build_zarr)
    assert code == 1
    assert "--build.input_root" in last


def test_broken_coco_json_names_file_and_line(command: Command, folder: Path) -> None:
    for path in folder.glob("*.xml"):
        path.unlink()
    (folder / "_annotations.coco.json").write_text('{"images": [],\n "annotations": [}')
    code, _, last = build(command, folder, "--build.format", "coco")
    assert code == 1
    assert "_annotations.coco.json" in last
    assert "line 2" in last


def test_a_version_edited_by_hand_is_not_served(command: Command, folder: Path) -> None:
    result = build(command, folder)[1]
    assert result is not None
    manifest = Path(result["path"]) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"kept": 6', '"kept": 5'))
    code, _, last = build(command, folder)
    assert code == 1
    assert "manifest.json" in last
    assert "--build.if_exists clear" in last
    assert build(command, folder, "--build.if_exists", "clear")[0] == 0


def test_verify_names_a_truncated_chunk_and_exits_1(command: Command, folder: Path) -> None:
    result = build(command, folder)[1]
    assert result is not None
    assert command(verify_zarr, "--verify.path", result["path"])[:2] == (
        0,
        {"ok": True, "files": 40, "bad": []},
    )
    path = "warehouse.zarr/train/image/c/0/0/0/0"
    os.truncate(Path(result["path"]) / path, 50)
    code, report, _ = command(verify_zarr, "--verify.path", result["path"])
    assert code == 1
    assert report == {"ok": False, "files": 40, "bad": [path]}


@pytest.mark.parametrize(
    "script", [inspect_zarr, verify_zarr, export_summary], ids=lambda s: s.__name__.split(".")[1]
)
def test_without_a_warehouse_the_build_is_named(
    command: Command, tmp_path: Path, script: Any
) -> None:
    code, _, last = command(script, "--build.output_root", str(tmp_path))
    assert code == 1
    assert "scripts.build_zarr" in last


def test_an_output_root_that_is_a_file_is_refused(command: Command, folder: Path) -> None:
    (folder.parent / "root").touch()
    code, _, last = build(command, folder)
    assert code == 1
    assert "is a file" in last
    assert "--build.output_root" in last


def test_inspection_draws_and_the_exported_tables_answer_the_readme_s_query(
    command: Command, folder: Path, tmp_path: Path
) -> None:
    import duckdb

    result = build(command, folder)[1]
    assert result is not None
    code, report, _ = command(
        inspect_zarr,
        "--inspect.path",
        result["path"],
        "--inspect.output",
        str(tmp_path / "sheet.png"),
    )
    assert code == 0
    assert report is not None
    with Image.open(report["sheet"]) as sheet:
        assert sheet.size[0] > 256
    code, report, _ = command(
        export_summary, "--export.path", result["path"], "--export.output", str(tmp_path / "tables")
    )
    assert code == 0
    query = re.search(
        r"duckdb\.sql\(\"\"\"(.*?)\"\"\"",
        (Path(__file__).parents[2] / "README.md").read_text(),
        re.DOTALL,
    )
    assert query, "the README shows a DuckDB query"
    rows = duckdb.sql(query[1].replace("artifacts/export", str(tmp_path / "tables"))).fetchall()
    assert sum(row[1] for row in rows) == 6
    assert sum(row[2] for row in rows) == 12


def test_a_folder_without_boxes_builds(command: Command, folder: Path) -> None:
    for path in folder.glob("*.xml"):
        path.unlink()
    result = build(command, folder)[1]
    assert result is not None
    assert result["kept"] == 6
    assert not Warehouse.open(result["path"]).split("train").array("box_mask")[:].any()


def test_byte_identical_pictures_share_a_split(command: Command, folder: Path) -> None:
    for at in range(6, 26):
        picture(folder / f"p{at}.jpg", at)
        voc(folder / f"p{at}.xml", [(2, 3, 20, 25)])
        shutil.copy(folder / f"p{at}.jpg", folder / f"copy{at}.jpg")
        voc(folder / f"copy{at}.xml", [(2, 3, 20, 25)])
    result = build(command, folder, "--build.splits", '{"train": 0.5, "val": 0.5}')[1]
    assert result is not None
    rows = Warehouse.open(result["path"]).table("samples.parquet").to_pylist()
    split_of: dict[str, set[str]] = {}
    for row in rows:
        split_of.setdefault(row["source_sha256"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in split_of.values())
    assert {row["split"] for row in rows} == {"train", "val"}
