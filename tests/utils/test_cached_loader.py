"""The loader of a cached dataset.

The order and the items of a plain one for any number of workers, and no work that was done before.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
from cache_fakes import Polygons, polygons, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from benchmarks.tensor_cache import Pictures, measure
from utils.caching.cached_loader import CachedLoader
from utils.caching.tensor_cache import CachedDataset
from warehouse.errors import ConfigError, PictureError, WorkerError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
FORK = multiprocessing.get_context("fork")


def as_it_is(batch):
    return batch


def loader_of(dataset, workers=2, *, limit=1 << 30, **options):
    options = {
        "batch_size": 5,
        "collate_fn": as_it_is,
        "multiprocessing_context": FORK if workers else None,
    } | options
    return CachedLoader(CachedDataset(dataset, limit_bytes=limit), num_workers=workers, **options)


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all fits", "half fits"])
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_batches_are_a_plain_loader_s_in_every_epoch(tmp_path, workers, share):
    whole = CachedDataset(Polygons(23))
    for index in range(23):
        _ = whole[index]
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1)).tolist()
    plain = list(DataLoader(Polygons(23), batch_size=5, sampler=order, collate_fn=as_it_is))
    loader = loader_of(
        Polygons(23, tmp_path / "calls"),
        workers,
        limit=int(whole.cache.stats.bytes * share),
        sampler=order,
    )
    sizes = []
    for _ in range(3):
        assert same(list(loader), plain)
        sizes.append((tmp_path / "calls").stat().st_size)
    stats = loader.dataset.cache.stats
    left = 23 - stats.items
    assert stats.hits == 2 * stats.items
    assert stats.misses == 23 + 2 * left
    assert stats.bytes <= whole.cache.stats.bytes * share
    assert os.fstat(loader.dataset.cache.fd).st_size == stats.bytes
    probed = 2 * max(1, workers)
    assert sizes[0] <= 23 + probed
    assert sizes[2] <= 23 + 2 * left + probed
    assert (left == 0) == (share == 1.0)
    assert (loader._workers is None) == (left == 0 or workers == 0), "workers end once all is kept"
    loader.close()


def test_spawned_workers_fill_the_same_cache_and_the_log_here_says_so_once(tmp_path, caplog):
    caplog.set_level("INFO")
    loader = loader_of(
        Polygons(9, tmp_path / "calls"),
        1,
        multiprocessing_context=multiprocessing.get_context("spawn"),
        batch_size=None,
    )
    for _ in range(2):
        assert all(same(item, polygons(index)) for index, item in enumerate(loader))
    assert (tmp_path / "calls").stat().st_size == 9 + 2
    assert caplog.text.count("will cache 9 samples") == 1


def test_the_second_epoch_is_twenty_times_faster_with_workers_too():
    loader = loader_of(Polygons(60, cost=0.010), 2, batch_size=8)
    seconds = []
    # A busy machine interrupts most passes of a few milliseconds, but hardly all of twenty.
    for _ in range(21):
        start = time.perf_counter()
        assert sum(map(len, loader)) == 60
        seconds.append(time.perf_counter() - start)
    assert seconds[0] > 20 * min(seconds[1:])


class CountedPictures(Pictures):
    """Twenty items; `calls` grows by a byte for each computation, in any process."""

    def __init__(self, calls):
        super().__init__(20, rounds=1)
        self.calls, self.looks = calls, 0
        calls.touch()

    def __getitem__(self, index):
        with open(self.calls, "ab", buffering=0) as file:
            file.write(b".")
        return super().__getitem__(index)

    def perf_counter(self):
        """Computations until now, and a thousandth for each look."""
        self.looks += 1
        return self.calls.stat().st_size + self.looks / 1000


@pytest.mark.parametrize(
    ("kind", "workers"), [("CachedLoader", 0), ("CachedLoader", 2), ("DataLoader", 2)]
)
def test_the_benchmark_s_rows_are_of_one_file_and_of_equal_items(
    kind, workers, tmp_path, monkeypatch
):
    pictures = CountedPictures(tmp_path / "calls")
    # Computations stand for seconds: which epoch is faster must not depend on the machine's load.
    monkeypatch.setattr("benchmarks.tensor_cache.time", pictures)
    row = measure(kind, workers, pictures, repeats=1)
    assert row["file_bytes"] == pytest.approx(20 * 197_000, rel=0.05)
    # Each process computes two of its items twice, to see whether the same comes out.
    assert row["first_s"] == pytest.approx(20 + 2 * max(1, workers) + 0.001)
    assert row["second_s"] == pytest.approx(0.001)
    assert (row["grown_bytes"] > 0) <= (workers > 0)


def test_what_is_handed_out_cannot_change_the_cache():
    loader = loader_of(Polygons(6), batch_size=None)
    for _ in range(3):
        for index, item in enumerate(loader):
            assert same(item, polygons(index))
            item["image"].zero_()
            item["polygons"].clear()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-7, 6), max_size=20), st.none() | st.integers(1, 5), st.booleans())
def test_any_order_and_batch_size_is_a_plain_loader_s(order, size, drop_last):
    drop_last = drop_last and size is not None
    positive = [index % 7 for index in order]
    plain = list(
        DataLoader(
            Polygons(7), batch_size=size, sampler=positive, drop_last=drop_last, collate_fn=as_it_is
        )
    )
    loader = loader_of(Polygons(7), 0, batch_size=size, sampler=order, drop_last=drop_last)
    for _ in range(2):
        assert same(list(loader), plain)
        assert len(loader) == len(plain)


class Numbers:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": torch.full((2,), index), "n": index}


@pytest.mark.parametrize("size", [None, 4])
def test_without_a_collate_function_it_is_data_loader_s(size):
    plain = list(DataLoader(Numbers(), batch_size=size))
    for workers in (0, 2):
        assert same(list(loader_of(Numbers(), workers, batch_size=size, collate_fn=None)), plain)


def test_an_epoch_that_ends_early_and_repeated_numbers_do_no_harm(tmp_path):
    loader = loader_of(
        Polygons(30, tmp_path / "calls"), batch_size=None, sampler=[*range(30), 3, 3, 29]
    )
    for at, _ in enumerate(loader):
        if at == 4:
            break
    for _ in range(2):
        assert all(
            same(item, polygons(index)) for index, item in zip(loader.sampler, loader, strict=True)
        )
    assert loader.dataset.cache.stats.items == 30
    assert loader._workers is None


class Faulty(Polygons):
    """Fails at number 7 in the way asked for."""

    def __init__(self, how):
        super().__init__(12)
        self.how = how

    def __getitem__(self, index):
        if index == 7 and self.how == "kill":
            # What it answered before is sent by then, and no lock of the queue dies with it.
            self.cost = 0.05
            super().__getitem__(index)
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 7:
            raise self.how
        return super().__getitem__(index)


@pytest.mark.parametrize("share", [1.0, 0.3], ids=["all fits", "some fits"])
def test_a_second_iteration_beside_the_first_disturbs_neither(share):
    whole = CachedDataset(Polygons(40))
    for index in range(40):
        _ = whole[index]
    loader = loader_of(Polygons(40), batch_size=None, limit=int(whole.cache.stats.bytes * share))
    first = iter(loader)
    for index in range(3):
        assert same(next(first), polygons(index))
    loader.sampler = range(39, -1, -1)
    second = iter(loader)
    for index in range(37):
        assert same(next(second), polygons(39 - index))
        assert same(next(first), polygons(index + 3))
    assert same(list(second), [polygons(index) for index in (2, 1, 0)])
    assert next(first, None) is None
    assert same(list(loader), [polygons(index) for index in loader.sampler])
    loader.close()


def test_closing_it_in_the_middle_ends_its_workers_and_not_its_items():
    loader = loader_of(Polygons(30), batch_size=None)
    items = iter(loader)
    for index in range(30):
        assert same(next(items), polygons(index))
        if index == 4:
            loader.close()
            assert multiprocessing.active_children() == []
    assert next(items, None) is None


def test_an_item_that_is_damaged_after_its_first_epoch_is_computed_again(tmp_path):
    loader = loader_of(Polygons(20, tmp_path / "calls"), batch_size=None)
    assert same(list(loader), [polygons(index) for index in range(20)])
    cache = loader.dataset.cache
    os.pwrite(cache.fd, b"\0" * 400, cache.start + 10)  # an item
    os.pwrite(cache.fd, b"\xff" * 8, 64 + 48 * 11)  # and another one's row
    before = (tmp_path / "calls").stat().st_size
    for _ in range(2):
        assert same(list(loader), [polygons(index) for index in range(20)])
    assert before + 2 <= (tmp_path / "calls").stat().st_size <= before + 2 + 2, (
        "each once more, and twice at most to see that it is not random"
    )
    assert cache.stats.damaged == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_typed_error_of_a_worker_is_raised_as_it_is_and_in_its_place(workers):
    error = PictureError("truncated", where="img_7.jpg", remedy="remove the file")
    loader = loader_of(Faulty(error), workers, batch_size=None)
    for _ in range(2):
        seen = []
        with pytest.raises(PictureError) as caught:
            seen.extend(loader)  # a list keeps what came before the error
        assert str(caught.value) == str(error)
        assert same(seen, [polygons(index) for index in range(7)])


def test_any_other_error_of_a_worker_is_raised_by_its_type():
    with pytest.raises(ZeroDivisionError, match="by seven"):
        list(loader_of(Faulty(ZeroDivisionError("by seven"))))


def test_a_worker_that_dies_is_an_error_of_its_own_and_not_a_hang():
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"killed by signal|exited unexpectedly"):
        list(loader_of(Faulty("kill")))
    assert time.monotonic() - start < 20


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="CachedDataset"):
        CachedLoader(Polygons(3))
    for bad in ({"batch_size": 0}, {"num_workers": -1}, {"batch_size": None, "drop_last": True}):
        with pytest.raises(ConfigError, match="impossible"):
            CachedLoader(CachedDataset(Polygons(3)), **bad)
