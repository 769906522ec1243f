"""Spawned workers that die, raise or hang; the same order for any number of them.

A reader killed and resumed elsewhere.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fakes import build

from utils.loader import ChunkLoader
from utils.samplers import ChunkBatchSampler
from warehouse import Warehouse
from warehouse.errors import WorkerError
from warehouse.read.chunks import ChunkReader
from warehouse.read.version import Split

pytestmark = pytest.mark.filterwarnings("ignore:batch_size")


class BrokenSplit(Split):
    """A split whose reader fails at chunk 2 in a way no one thought of.

    It raises, or ends its process.
    """

    def __init__(self, warehouse: Warehouse, how: str) -> None:
        super().__init__(warehouse, "train")
        self.how = how

    def reader(self, **options: Any) -> ChunkReader:
        reader = BrokenReader(self.source, access="mmap", verify="first_touch", keep=8)
        reader.how = self.how
        return reader

    def __reduce__(self) -> tuple[Any, ...]:
        return BrokenSplit, (self.warehouse, self.how)


class BrokenReader(ChunkReader):
    how: str

    def fill(self, names: Any, indices: Any, out: Any) -> tuple[int, int]:
        if (indices >= 16).any():
            if self.how == "raise":
                raise ZeroDivisionError("nobody\nthought of this")
            os._exit(3)
        return super().fill(names, indices, out)


def pids(loader: ChunkLoader) -> list[int]:
    return [worker.pid for worker in loader.engine.loader._iterator._workers]  # type: ignore[attr-defined]


def alive(numbers: list[int]) -> list[int]:
    return [pid for pid in numbers if psutil.pid_exists(pid)]


def shared_files() -> set[str]:
    """Files of /dev/shm that this process has mapped: others may come and go there meanwhile."""
    return {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if " /dev/shm/" in line
    }


def drain(iterator: Any) -> None:
    for _ in iterator:
        pass


def test_a_worker_that_raises_is_named_with_what_it_raised_and_the_loader_goes_on(
    small: Warehouse,
) -> None:
    split = BrokenSplit(small, "raise")
    with ChunkLoader(
        split, 4, engine="spawn", num_workers=2, shuffle=False, store="mmap"
    ) as loader:
        for _ in range(2):
            iterator = iter(loader)
            seen = [next(iterator)["index"].tolist() for _ in range(4)]
            assert seen == [list(range(at, at + 4)) for at in (0, 4, 8, 12)]
            with pytest.raises(
                WorkerError,
                match=r"worker [01] \(pid \d+\); found ZeroDivisionError: nobody thought of this",
            ):
                drain(iterator)
        workers = pids(loader)
    assert alive(workers) == []


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_a_worker_that_dies_is_named_with_its_exit(small: Warehouse, how: str) -> None:
    split = small.split("train") if how == "killed" else BrokenSplit(small, "exit")
    with ChunkLoader(
        split, 1, engine="spawn", num_workers=2, prefetch_factor=1, shuffle=False, store="mmap"
    ) as loader:
        iterator = iter(loader)
        next(iterator)
        workers, made = pids(loader), shared_files()
        start = time.monotonic()
        if how == "killed":
            os.kill(workers[1], signal.SIGKILL)
        with pytest.raises(WorkerError) as caught:
            drain(iterator)
        assert time.monotonic() - start < 30
        expected = (
            rf"worker 1 \(pid {workers[1]}\); found killed by SIGKILL"
            if how == "killed"
            else r"worker [01] \(pid \d+\).*exit code 3"
        )
        caught.match(expected)
        assert alive(workers) == [], "the other worker is gone too, before anybody calls close()"
        if how == "killed":
            assert sum(len(batch["index"]) for batch in loader) == 29, (
                "a new epoch starts new workers"
            )
    del loader, iterator, caught
    gc.collect()
    assert made
    assert [name for name in made if Path(name).exists()] == []


def test_a_worker_that_hangs_is_named_and_ended(small: Warehouse) -> None:
    """A stopped process does not act on SIGTERM: only SIGKILL ends it."""
    with ChunkLoader(
        small.split("train"),
        1,
        engine="spawn",
        num_workers=2,
        prefetch_factor=1,
        worker_timeout=60,
        store="mmap",
    ) as loader:
        iterator = iter(loader)
        next(iterator)
        # Starting takes workers up to 6 s on a busy machine; only what follows is to be timed.
        waiting: Any = loader.engine.loader._iterator  # type: ignore[attr-defined]
        assert waiting._timeout == 60
        waiting._timeout = 6
        workers, made = pids(loader), shared_files()
        os.kill(workers[1], signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(
            WorkerError,
            match=rf"hangs: worker 1 \(pid {workers[1]}\); found no answer for 6 s.*worker_timeout",
        ) as caught:
            drain(iterator)
        assert time.monotonic() - start < 6 + 5
        assert alive(workers) == []
    del loader, iterator, caught
    gc.collect()
    assert made
    assert [name for name in made if Path(name).exists()] == []


def test_the_shipped_patience_leaves_the_error_within_30_seconds() -> None:
    from utils.loading.settings import LoaderSettings

    assert LoaderSettings().worker_timeout <= 25


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Warehouse]:
    """By chunk size.

    Chunks of 8 with a last one of 5, of 3 with a last one of 2, and one chunk of 29.
    """
    return {
        size: build(tmp_path_factory.mktemp("ragged"), {"train": 29}, _with_chunks(size))
        for size in (8, 3, 64)
    }


def _with_chunks(size: int) -> Any:
    from fakes import SMALL

    return type(SMALL)(**(SMALL.model_dump() | {"shard_samples": size}))


HERE = [("inline", 0), ("thread", 0), ("thread", 1), ("thread", 2), ("thread", 4), ("spawn", 0)]
SPAWNED = [("spawn", 1, 64), ("spawn", 2, 8), ("spawn", 4, 3)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("engine", "workers", "size"), [(*each, size) for each in HERE for size in (8, 3, 64)] + SPAWNED
)
def test_any_engine_and_worker_count_decodes_each_sample_once_in_the_same_order(
    ragged: dict[int, Warehouse], engine: Any, workers: int, size: int
) -> None:
    """One loader for every batch size.

    Spawned workers know none, and starting them is what takes the time.
    """
    split = ragged[size].split("train")
    with ChunkLoader(
        split, 64, engine=engine, num_workers=workers, store="mmap", interleave=2
    ) as loader:
        for batch_size in (64, 7, 1):
            loader.sampler = ChunkBatchSampler(split.chunk_sizes, batch_size, seed=5, interleave=2)
            seen = [batch["index"].tolist() for batch in loader]
            reference = ChunkBatchSampler(split.chunk_sizes, batch_size, seed=5, interleave=2)
            assert seen == [list(item) for item in reference]
            assert loader.stats.decoded / loader.stats.samples == 1.0
            with ChunkLoader(split, sampler=reference, engine="inline", store="mmap") as inline:
                drain(inline)
                assert loader.order_digest == inline.order_digest


READ = """
    import json, sys
    from utils.loader import ChunkLoader
    from warehouse import Warehouse

    if __name__ == "__main__":
        split = Warehouse.open(sys.argv[1]).split("train")
        how = dict(engine=sys.argv[2], num_workers=int(sys.argv[3]), store=sys.argv[4])
        loader = ChunkLoader(split, 2, seed=9, interleave=2, **how)
        loader.set_epoch(1)
        for batch in loader:
            print(json.dumps(loader.state_dict() | {"seen": batch["index"].tolist()}), flush=True)
            if len(sys.stdin.readline()) == 0:
                break
"""


@pytest.mark.parametrize(
    ("killed", "resumed"),
    [
        (("thread", 4, "mmap"), ("inline", 0, "pread")),
        (("spawn", 2, "mmap"), ("thread", 3, "stream")),
    ],
    ids=lambda each: f"{each[0]}-{each[1]}-{each[2]}",
)
def test_a_reader_killed_mid_epoch_continues_elsewhere_to_the_same_digest(
    small: Warehouse, tmp_path: Path, killed: tuple[str, int, str], resumed: tuple[Any, int, Any]
) -> None:
    script = tmp_path / "read.py"
    script.write_text(textwrap.dedent(READ))
    command = [sys.executable, str(script), str(small.folder), killed[0], str(killed[1]), killed[2]]
    states = []
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        for _ in range(6):
            states.append(json.loads(reader.stdout.readline()))
            reader.stdin.write("on\n")
            reader.stdin.flush()
        children = psutil.Process(reader.pid).children()
        reader.kill()
    psutil.wait_procs(
        children, timeout=15
    )  # torch's workers look every 5 s whether their parent is there
    assert alive([child.pid for child in children]) == []
    split, state = small.split("train"), states[-1]
    seen = [index for each in states for index in each["seen"]]
    with (
        ChunkLoader(split, 2, engine="inline", seed=9, interleave=2) as whole,
        ChunkLoader(
            split,
            2,
            engine=resumed[0],
            num_workers=resumed[1],
            store=resumed[2],
            seed=9,
            interleave=2,
        ) as rest,
    ):
        whole.set_epoch(1)
        order = [index for batch in whole for index in batch["index"].tolist()]
        rest.load_state_dict({key: value for key, value in state.items() if key != "seen"})
        rest.set_epoch(1)
        assert seen + [index for batch in rest for index in batch["index"].tolist()] == order
        assert rest.order_digest == whole.order_digest
        assert np.array_equal(np.sort(order), np.arange(29))
