"""ChunkLoader.

The same batches from every engine, exact resume, batches that stay what they were, clean ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import build, numbers, sample

from utils.loader import ChunkLoader
from utils.loading.options import LoaderOptions
from utils.loading.stores import choose_store
from utils.samplers import ChunkBatchSampler, RandomBatchSampler
from warehouse import Warehouse
from warehouse.errors import ConfigError, CorruptError, StateError
from warehouse.read.version import Split

pytestmark = pytest.mark.filterwarnings("ignore:batch_size")


def indices(loader: ChunkLoader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


@pytest.mark.parametrize(
    ("engine", "workers"),
    [("inline", 0), ("thread", 0), ("thread", 1), ("thread", 2), ("thread", 4), ("spawn", 0)],
)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("store", ["mmap", "pread", "memory", "stream"])
def test_engines_deliver_what_was_baked_once_each(
    small: Warehouse, engine: Any, workers: int, batch_size: int, store: Any
) -> None:
    split = small.split("train")
    with ChunkLoader(
        split, batch_size, engine=engine, num_workers=workers, store=store, seed=2, interleave=2
    ) as loader:
        seen = []
        for batch in loader:
            for row, index in enumerate(batch["index"].tolist()):
                want = sample(numbers("train", 29)[index])
                assert all(
                    np.array_equal(batch[name][row].numpy(), want[name]) for name in split.arrays
                )
                seen.append(index)
        assert sorted(seen) == list(range(29))
        assert (loader.stats.samples, loader.stats.decoded) == (29, 29)
        reference = ChunkBatchSampler(split.chunk_sizes, batch_size, seed=2, interleave=2)
        assert seen == [index for item in reference for index in item]


@pytest.mark.parametrize("store", ["mmap", "pread", "memory", "stream"])
def test_spawned_workers_give_the_same_order_and_digest(small: Warehouse, store: Any) -> None:
    split = small.split("train")
    with (
        ChunkLoader(split, 4, engine="inline", seed=1, store="mmap") as one,
        ChunkLoader(split, 4, engine="spawn", num_workers=2, seed=1, store=store) as two,
    ):
        for epoch in range(2):
            one.set_epoch(epoch)
            two.set_epoch(epoch)
            for left, right in zip(one, two, strict=True):
                assert all(torch.equal(left[name], right[name]) for name in left)
            assert one.order_digest == two.order_digest
            assert two.stats.decoded == two.stats.samples == 29
        iterator = iter(two)
        held = next(iterator)["image"].clone()
        next(iterator)
        state = two.state_dict()
        again = next(iter(two))  # a second iter() ends the first; its batches in flight are dropped
        assert torch.equal(again["image"], held)
        one.load_state_dict(state)
        two.load_state_dict(state)
        assert indices(one) == indices(two)


def test_a_spawned_worker_s_error_keeps_its_type_and_line(tmp_path: Path) -> None:
    warehouse = build(tmp_path)
    path = warehouse.store / "train/image/c/2/0/0/0"
    path.write_bytes(b"\0" * path.stat().st_size)
    with (
        ChunkLoader(warehouse.split("train"), 4, engine="spawn", num_workers=1) as loader,
        pytest.raises(CorruptError, match="image/c/2") as caught,
    ):
        indices(loader)
    assert "\n" not in str(caught.value)


def test_every_held_batch_is_still_right_at_the_end(small: Warehouse) -> None:
    with ChunkLoader(small.split("train"), 2, engine="thread", num_workers=2) as loader:
        held = [
            (batch["index"].tolist(), batch["image"][:, :1], batch["box"].detach())
            for batch in loader
        ]
        assert loader.stats.fallback_buffers > 0, "holding everything must outrun the ring"
        for index, image, box in held:
            for row, number in enumerate(index):
                want = sample(numbers("train", 29)[number])
                assert np.array_equal(image[row].numpy(), want["image"][:1])
                assert np.array_equal(box[row].numpy(), want["box"])


def test_buffers_are_reused_when_nothing_refers_to_them(small: Warehouse) -> None:
    with ChunkLoader(small.split("train"), 2, engine="thread", num_workers=2) as loader:
        places = set()
        for batch in loader:
            places.add(batch["image"].data_ptr())
        assert loader.stats.fallback_buffers == 0
        assert len(places) <= loader.engine.ring.slots  # type: ignore[union-attr]


@pytest.mark.parametrize("stop", range(9))
def test_resume_at_every_batch_with_another_engine_continues_order_and_digest(
    small: Warehouse, stop: int
) -> None:
    split = small.split("train")
    with (
        ChunkLoader(split, 4, engine="inline", seed=5) as whole,
        ChunkLoader(split, 4, engine="thread", num_workers=3, seed=5) as other,
    ):
        whole.set_epoch(3)
        order = indices(whole)
        digest = whole.order_digest
        iterator = iter(whole)
        head = [next(iterator)["index"].tolist() for _ in range(stop)]
        other.load_state_dict(whole.state_dict())
        other.set_epoch(3)
        assert head + indices(other) == order
        assert other.order_digest == digest


def test_the_digest_adds_up_over_ranks_and_pads_are_marked(small: Warehouse) -> None:
    split = small.split("train")
    with ChunkLoader(split, 4, engine="inline") as alone:
        indices(alone)
        total, seen = 0, []
        for rank in range(3):
            with ChunkLoader(split, 4, engine="inline", rank=rank, world_size=3) as part:
                for batch in part:
                    assert batch["pad"].shape == batch["index"].shape
                    seen += batch["index"][~batch["pad"]].tolist()
                total += int(part.order_digest, 16)
        assert total % 2**256 == int(alone.order_digest, 16)
        assert sorted(seen) == list(range(29))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "v000000000000"),
        ("split", "val"),
        ("batch_size", 2),
        ("seed", 9),
        ("sampler", "RandomBatchSampler"),
    ],
)
def test_a_state_of_something_else_is_refused_by_name(
    small: Warehouse, key: str, value: Any
) -> None:
    with (
        ChunkLoader(small.split("train"), 4, engine="inline") as loader,
        pytest.raises(StateError, match=key),
    ):
        loader.load_state_dict(loader.state_dict() | {key: value})


@pytest.mark.parametrize("engine", ["thread", "spawn"])
@pytest.mark.parametrize(("interleave", "chunks_per_batch"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_stream_fetches_each_chunk_once_and_holds_few(
    small: Warehouse, engine: Any, interleave: int, chunks_per_batch: int
) -> None:
    split = small.split("train")
    options: dict[str, Any] = {
        "interleave": interleave,
        "chunks_per_batch": chunks_per_batch,
        "prefetch": 1,
    }
    with ChunkLoader(split, 4, engine=engine, num_workers=1, store="stream", **options) as loader:
        reader = loader.engine.reader
        assert len(reader.buffers) == 1 + interleave * chunks_per_batch  # type: ignore[attr-defined]
        for epoch in (1, 2):
            loader.set_epoch(epoch)
            assert sorted(index for batch in indices(loader) for index in batch) == list(range(29))
            assert reader.fetches == epoch * len(split.chunk_sizes)  # type: ignore[attr-defined]
        next(iter(loader))
        assert sorted(index for batch in indices(loader) for index in batch) == list(range(29)), (
            "an abandoned epoch leaves nothing behind"
        )


@pytest.mark.parametrize("engine", ["inline", "thread", "spawn"])
@pytest.mark.parametrize("store", ["mmap", "pread", "memory", "stream"])
def test_damage_is_a_typed_error_through_every_store(
    tmp_path: Path, engine: Any, store: Any
) -> None:
    warehouse = build(tmp_path)
    path = warehouse.store / "train/image/c/2/0/0/0"
    data = bytearray(path.read_bytes())
    data[100] ^= 8
    path.write_bytes(data)
    with (
        ChunkLoader(
            warehouse.split("train"), 4, engine=engine, num_workers=1, store=store
        ) as loader,
        pytest.raises(CorruptError, match="image/c/2"),
    ):
        indices(loader)


@pytest.mark.parametrize(
    ("available", "kind", "expected"),
    [
        (10**9, "ext4", "memory"),
        (200_000, "ext4", "mmap"),
        (200_000, "nfs4", "stream"),
        (20_000, "ext4", "stream"),
        (10**9, "nfs", "memory"),
    ],
)
def test_auto_goes_by_memory_and_file_system_and_says_why(
    small: Warehouse, available: int, kind: str, expected: str
) -> None:
    split = small.split("train")
    sampler = ChunkBatchSampler(split.chunk_sizes, 4)
    choice = choose_store("auto", split, split.arrays, sampler, available=available, kind=kind)
    assert choice.store == expected
    assert len(choice.reason.split()) > 4
    if expected == "stream":
        random = RandomBatchSampler(split.chunk_sizes, 4)
        assert (
            choose_store("auto", split, split.arrays, random, available=available, kind=kind).store
            != "stream"
        )


@pytest.mark.parametrize("store", ["auto", "memory", "mmap", "stream", "library"])
def test_which_arrays_only_zarr_python_reads_is_looked_up_once(
    small: Warehouse, monkeypatch: pytest.MonkeyPatch, store: Any
) -> None:
    asked = []
    foreign = Split.foreign

    def counted(self: Split, names: Any) -> dict[str, str]:
        asked.append(list(names))
        return foreign(self, names)

    monkeypatch.setattr(Split, "foreign", counted)
    with ChunkLoader(small.split("train"), 4, engine="inline", store=store) as loader:
        assert sum(len(batch["index"]) for batch in loader) == len(loader.split)
    assert len(asked) == (store != "library")


def test_options_are_frozen_and_checked_when_made() -> None:
    options = LoaderOptions(engine="spawn", num_workers=0)
    assert not options.spawns
    with pytest.raises(FrozenInstanceError):
        options.num_workers = 2  # type: ignore[misc]
    for wrong in ({"engine": "fibre"}, {"store": "tape"}, {"verify": "never"}, {"prefetch": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LoaderOptions(**wrong)  # type: ignore[arg-type]


def test_a_split_that_does_not_fit_is_refused_with_the_size_needed(small: Warehouse) -> None:
    split = small.split("train")
    with pytest.raises(ConfigError, match="MB free"):
        choose_store(
            "memory", split, split.arrays, ChunkBatchSampler(split.chunk_sizes, 4), available=1000
        )


def test_a_stream_of_a_random_sampler_is_refused(small: Warehouse) -> None:
    split = small.split("train")
    with pytest.raises(ConfigError, match="RandomBatchSampler"):
        ChunkLoader(split, sampler=RandomBatchSampler(split.chunk_sizes, 4), store="stream")


def test_a_spawned_stream_abandoned_with_more_in_flight_than_buffers_goes_on(
    small: Warehouse,
) -> None:
    """One batch a chunk.

    What is outstanding needs more buffers than there are, until somebody takes it in.
    """
    with ChunkLoader(
        small.split("train"), 8, engine="spawn", num_workers=2, store="stream", prefetch=1
    ) as loader:
        for _ in range(3):
            next(iter(loader))
        assert sorted(index for batch in indices(loader) for index in batch) == list(range(29))


def test_a_split_that_failed_to_load_into_memory_is_never_served(tmp_path: Path) -> None:
    warehouse = build(tmp_path)
    path = warehouse.store / "train/image/c/1/0/0/0"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with ChunkLoader(warehouse.split("train"), 4, engine="inline", store="memory") as loader:
        for _ in range(2):
            with pytest.raises(CorruptError, match="image/c/1"):
                next(iter(loader))


def test_the_digest_of_ranks_resumed_from_one_state_counts_it_once(small: Warehouse) -> None:
    split = small.split("train")
    with (
        ChunkLoader(split, 4, engine="inline") as alone,
        ChunkLoader(split, 4, engine="inline") as first,
    ):
        indices(alone)
        iterator = iter(first)
        for _ in range(3):
            next(iterator)
        total = 0
        for rank in range(2):
            with ChunkLoader(split, 4, engine="inline", rank=rank, world_size=2) as part:
                part.load_state_dict(first.state_dict())
                indices(part)
                total += int(part.order_digest, 16)
        assert total % 2**256 == int(alone.order_digest, 16)


def test_a_batch_size_beyond_the_split_takes_no_more_memory_than_the_split(
    small: Warehouse,
) -> None:
    with ChunkLoader(small.split("train"), 10**9, engine="inline") as loader:
        assert [len(batch) for batch in indices(loader)] == [8, 8, 8, 5] or sum(
            map(len, indices(loader))
        ) == 29
        assert loader.engine.ring.layout.rows == 8


def test_a_random_sampler_reads_across_chunks(small: Warehouse) -> None:
    split = small.split("train")
    with ChunkLoader(
        split, sampler=RandomBatchSampler(split.chunk_sizes, 9), engine="thread"
    ) as loader:
        for batch in loader:
            for row, index in enumerate(batch["index"].tolist()):
                assert np.array_equal(
                    batch["image"][row].numpy(), sample(numbers("train", 29)[index])["image"]
                )
        assert loader.stats.decoded == 29


def test_only_the_arrays_asked_for_are_read(small: Warehouse) -> None:
    with ChunkLoader(small.split("train"), 4, arrays=["label"], engine="inline") as loader:
        assert set(next(iter(loader))) == {"label", "index"}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"engine": "fork"}, "deadlocks"),
        ({"engine": "magic"}, "spawn"),
        ({"store": "tape"}, "store"),
        ({"verify": "maybe"}, "verify"),
        ({"arrays": ["boxes"]}, "boxes"),
        ({"num_workers": -1}, "num_workers"),
        ({"batch_size": -4}, "batch_size"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(
    small: Warehouse, wrong: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        ChunkLoader(small.split("train"), **({"batch_size": 4} | wrong))


def test_a_sampler_of_another_split_is_refused(small: Warehouse) -> None:
    with pytest.raises(ConfigError, match="another split"):
        ChunkLoader(small.split("train"), sampler=ChunkBatchSampler([8, 8], 4))


END = """
    import sys
    from utils.loader import ChunkLoader
    from warehouse import Warehouse

    if __name__ == "__main__":
        split = Warehouse.open(sys.argv[1]).split("train")
        loader = ChunkLoader(split, 2, engine=sys.argv[2], num_workers=2)
        for step, batch in enumerate(loader):
            if step == 3:
                {leave}
"""


def unowned_files(before: set[Path]) -> list[Path]:
    """New files of /dev/shm that no running process has mapped; other programs use it as well."""
    new = set(Path("/dev/shm").iterdir()) - before
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += maps.read_text()
    # A semaphore of `multiprocessing` loses its name as soon as it is open.
    return [path for path in new if str(path) not in mapped and path.exists()]


def marked_processes(variable: str) -> list[str]:
    """Running processes that have inherited an environment variable."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in environ.read_bytes().split(b"\0"):
                found.append(environ.parent.name)
    return found


@pytest.mark.parametrize("engine", ["thread", "spawn"])
@pytest.mark.parametrize(("leave", "code"), [("break", 0), ("sys.exit(7)", 7)])
def test_leaving_mid_epoch_ends_quietly(
    small: Warehouse, tmp_path: Path, engine: str, leave: str, code: int
) -> None:
    script = tmp_path / "leave.py"
    script.write_text(textwrap.dedent(END).format(leave=leave))
    before = set(Path("/dev/shm").iterdir())
    done = subprocess.run(
        [sys.executable, script, small.folder, engine],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"LEFT_BY": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (code, "")
    # A worker that lives on would own its files.
    assert not marked_processes(f"LEFT_BY={tmp_path}")
    assert not unowned_files(before)


def test_a_forked_process_is_refused_with_the_reason(small: Warehouse) -> None:
    """The check compares process ids.

    A real fork of a threaded process is what it protects from.
    """
    with ChunkLoader(small.split("train"), 4, engine="inline") as loader:
        loader._pid += 1
        with pytest.raises(ConfigError, match="spawn"):
            iter(loader)
        loader._pid -= 1


def test_a_killed_worker_is_an_error_that_names_it(small: Warehouse) -> None:
    import signal

    from warehouse.errors import WorkerError

    with ChunkLoader(
        small.split("train"), 1, engine="spawn", num_workers=1, prefetch_factor=1
    ) as loader:
        iterator = iter(loader)
        next(iterator)
        os.kill(loader.engine.loader._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[union-attr]
        with pytest.raises(WorkerError, match="worker"):
            for _ in iterator:
                pass
