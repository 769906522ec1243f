"""A plan that contradicts itself is refused before anything is baked."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warehouse import Warehouse
from warehouse.errors import BuildError, PictureError
from warehouse.format.manifest import toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION, ArraySpec, Codec
from warehouse.layouts.plan import Block, BuildPlan, SplitPlan
from warehouse.layouts.rows import Rows
from warehouse.write.check_plan import check_plan
from warehouse.write.publish import bake

LZ4 = Codec("lz4", 9, True, 4)
SAMPLES = 10


def spec(name: str, row: tuple[int, ...], **changes: Any) -> ArraySpec:
    made = ArraySpec(
        name=name,
        shape=(SAMPLES, *row),
        dtype="float32",
        dims=("sample", "y", "x")[: len(row) + 1],
        chunk=(4, *row),
        inner=(1, *row) if row else None,
        codec=LZ4,
    )
    return replace(made, **changes)


def split(*specs: ArraySpec, name: str = "train", **changes: Any) -> SplitPlan:
    rows = tuple({"split": name, "index": at} for at in range(SAMPLES))
    made = SplitPlan(
        name=name,
        specs=specs,
        payloads=tuple(range(SAMPLES)),
        digests=("",) * SAMPLES,
        rows=rows,
    )
    return replace(made, **changes)


def plan(*splits: SplitPlan) -> BuildPlan:
    recipe = {"format_version": FORMAT_VERSION, "format": "toy", "source": {"digest": ""}}
    version, key = version_name(recipe)
    return BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        toolchain=toolchain(),
        layout=Rows(),
        splits=splits,
        found=SAMPLES,
        kept=SAMPLES,
        summary={},
    )


MATRIX, KEY = spec("matrix", (2, 3)), spec("key", ())


def test_a_sound_plan_passes() -> None:
    check_plan(plan(split(MATRIX, KEY), split(MATRIX, KEY, name="val")))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ((), "no split"),
        ((split(),), "split train.*at least one"),
        ((split(MATRIX, spec("index", ())),), "array index.*belongs to the loader"),
        ((split(MATRIX, spec("key", (), shape=(9,))),), "array key.*same samples"),
        ((split(MATRIX, spec("key", (), chunk=(5,))),), "array key.*same chunk size"),
        ((split(spec("matrix", (2, 3), chunk=(4, 1, 3))),), "holds whole samples"),
        ((split(spec("matrix", (2, 3), inner=(2, 2, 3))),), "inner chunk is one sample"),
        ((split(spec("matrix", (2, 3), inner=(1, 1, 3))),), "inner chunk is one sample"),
        ((split(spec("key", (), inner=(1,))),), "inner chunk is one sample"),
        ((split(MATRIX, payloads=(1, 2)),), "payload.*expected 10, found 2"),
        ((split(MATRIX, rows=()),), "rows.*expected 10, found 0"),
        ((split(MATRIX), split(KEY, name="val")), "split val.*all splits"),
        ((split(MATRIX), split(spec("matrix", (2, 3), dtype="int16"), name="val")), "all splits"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    wrong: tuple[SplitPlan, ...], match: str
) -> None:
    with pytest.raises(BuildError) as caught:
        check_plan(plan(*wrong))
    text = str(caught.value)
    assert all(re.search(part, text) for part in match.split(".*")), text


def test_a_plan_that_keeps_a_failed_source_ends_with_an_error(tmp_path: Path) -> None:
    def load(number: int) -> tuple[dict[str, Any], dict[str, float]]:
        raise PictureError("unreadable", where=f"source {number}")

    with pytest.raises(BuildError, match="still holds sources that cannot be made"):
        bake(lambda _: plan(split(MATRIX)), lambda _: load, tmp_path)
    assert not (tmp_path / "CURRENT").exists()


def test_rows_that_are_baked_sample_by_sample_can_be_read(tmp_path: Path) -> None:
    def load(number: int) -> tuple[dict[str, Any], dict[str, float]]:
        sample = {"matrix": np.full((2, 3), number, np.float32), "key": np.float32(number)}
        return {name: np.asarray(value) for name, value in sample.items()}, {}

    columns = dict.fromkeys(Rows.schema.names)
    source = [columns | {"split": "train", "index": at} for at in range(SAMPLES)]
    made = replace(plan(split(MATRIX, KEY)), layout=Rows(source_rows=source))
    bake(lambda _: made, lambda _: load, tmp_path)
    read = Warehouse.open(tmp_path).split("train")
    assert read.array("key")[:].tolist() == list(range(SAMPLES))


def test_rows_baked_with_the_defaults_can_be_read(tmp_path: Path) -> None:
    def load(chunk: int) -> Block:
        numbers = range(chunk * 4, min(chunk * 4 + 4, SAMPLES))
        samples = (
            {"matrix": np.full((2, 3), number, np.float32), "key": np.array(number, np.float32)}
            for number in numbers
        )
        return Block(range(len(numbers)), samples, {}, {})

    columns = dict.fromkeys(Rows.schema.names)
    source = [columns | {"split": "train", "index": at} for at in range(SAMPLES)]
    chunks = SplitPlan.of_chunks("train", [MATRIX, KEY], range(3))
    made = replace(plan(chunks), layout=Rows(source_rows=source))
    bake(lambda _: made, lambda _: load, tmp_path)
    read = Warehouse.open(tmp_path).split("train")
    assert read.array("key")[:].tolist() == list(range(SAMPLES))
    assert (read.array("matrix")[3] == 3).all()
