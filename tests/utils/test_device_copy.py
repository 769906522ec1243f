"""The order of things on the way to a GPU, with a device that copies as late as it may.

CudaDevice itself needs a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import build, numbers, sample

from utils.loader import ChunkLoader
from utils.loading.device_copy import COPIES_PENDING, CudaDevice, DeviceCopier
from warehouse import Warehouse
from warehouse.errors import ConfigError, CorruptError

pytestmark = pytest.mark.filterwarnings("ignore:batch_size")


class LateDevice:
    """Like a GPU with a slow bus.

    A copy reads its host memory only when somebody waits for its event (or a later one).
    """

    def __init__(self) -> None:
        self.queue: deque[LateEvent] = deque()
        self.log: list[str] = []
        self.locked = 0

    def lock(self, memory: Any) -> Any:
        self.locked += 1

        def unlock() -> None:
            assert not self.queue, "memory is unlocked under a copy"
            self.locked -= 1

        return unlock

    def copy(self, host: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], LateEvent]:
        copies = {name: torch.full_like(tensor, 77) for name, tensor in host.items()}
        # Views of the same memory, as a DMA engine has them: they keep nothing alive that the
        # copier lets go of.
        event = LateEvent(
            self,
            {name: tensor.data_ptr() for name, tensor in host.items()},
            copies,
            host["index"].tolist(),
        )
        self.queue.append(event)
        self.log.append(f"copy {event.index}")
        return copies, event

    def hand_over(self, copies: dict[str, torch.Tensor], event: LateEvent) -> None:
        event.synchronize()
        self.log.append(f"hand over {event.index}")


class LateEvent:
    def __init__(
        self,
        device: LateDevice,
        sources: dict[str, int],
        copies: dict[str, torch.Tensor],
        index: list[int],
    ) -> None:
        self.device, self.sources, self.copies, self.index, self.done = (
            device,
            sources,
            copies,
            index,
            False,
        )

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        while not self.done:
            event = self.device.queue.popleft()
            for name, target in event.copies.items():
                raw = np.ctypeslib.as_array(_at(event.sources[name]), (target.nbytes,)).copy()
                target.copy_(torch.from_numpy(raw).view(target.dtype).reshape(target.shape))
            event.done = True


def _at(address: int) -> Any:
    import ctypes

    return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))


def collect(items: Iterator[Any], into: list[Any]) -> None:
    for item in items:
        into.append(item)  # noqa: PERF402


@pytest.mark.parametrize(("engine", "workers"), [("inline", 0), ("thread", 2), ("spawn", 2)])
def test_late_copies_still_find_their_batches_in_the_ring(
    small: Warehouse, engine: Any, workers: int
) -> None:
    """A slot that came back before it was copied would hold a later batch, or 77 would be left."""
    device = LateDevice()
    with (
        ChunkLoader(
            small.split("train"), 2, engine=engine, num_workers=workers, store="mmap", device=device
        ) as loader,
        ChunkLoader(small.split("train"), 2, engine="inline", store="mmap") as plain,
    ):
        for epoch in range(2):
            loader.set_epoch(epoch)
            plain.set_epoch(epoch)
            for got, want in zip(loader, plain, strict=True):
                assert all(torch.equal(got[name], want[name]) for name in want)
            assert loader.order_digest == plain.order_digest
        assert device.locked == 1, "locked once, not every epoch"
        assert not device.queue


def host(number: int) -> dict[str, torch.Tensor]:
    return {"index": torch.tensor([number])}


def test_the_next_copy_is_under_way_when_a_batch_is_handed_over() -> None:
    device = LateDevice()
    assert [number for number, _ in DeviceCopier(device, None).run(iter(range(3)), host)] == [
        0,
        1,
        2,
    ]
    assert device.log == [
        "copy [0]",
        "copy [1]",
        "hand over [0]",
        "copy [2]",
        "hand over [1]",
        "hand over [2]",
    ]


@pytest.mark.parametrize("count", [0, 1])
def test_short_epochs_end(count: int) -> None:
    assert len(list(DeviceCopier(LateDevice(), None).run(iter(range(count)), host))) == count


def test_host_memory_is_held_until_its_event_and_no_longer() -> None:
    """Weak references to the host tensors.

    Alive while a copy is queued, never more than COPIES_PENDING of them.
    """
    import weakref

    device, refs = LateDevice(), []

    def tensors(number: int) -> dict[str, torch.Tensor]:
        array = np.array([number])
        refs.append((number, weakref.ref(array)))
        return {"index": torch.from_numpy(array)}

    for number, _ in DeviceCopier(device, None).run(iter(range(8)), tensors):
        alive = {each for each, ref in refs if ref() is not None}
        queued = {event.index[0] for event in device.queue}
        assert queued <= alive
        assert len(alive) <= COPIES_PENDING
        assert number + 1 in alive or number == 7
    assert all(ref() is None for _, ref in refs)


def test_leaving_early_waits_for_the_copies_under_way() -> None:
    device = LateDevice()
    copier = DeviceCopier(device, None)
    stream = copier.run(iter(range(5)), host)
    next(stream)
    assert device.queue
    stream.close()
    assert not device.queue
    assert not copier.pending
    copier.close()
    assert device.locked == 0


def test_an_error_comes_after_the_batches_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 0
        yield 1
        raise CorruptError("a file is damaged")

    device = LateDevice()
    seen: list[Any] = []
    with pytest.raises(CorruptError, match="damaged"):
        collect(DeviceCopier(device, None).run(failing(), host), seen)
    assert [number for number, _ in seen] == [0, 1]
    assert device.log[-1] == "hand over [1]"
    assert not device.queue


def test_damage_and_break_leave_a_loader_that_goes_on(tmp_path: Path) -> None:
    warehouse = build(tmp_path)
    device = LateDevice()
    with ChunkLoader(
        warehouse.split("train"), 4, engine="thread", store="mmap", shuffle=False, device=device
    ) as loader:
        for batch in loader:
            assert np.array_equal(
                batch["image"][0].numpy(),
                sample(numbers("train", 29)[int(batch["index"][0])])["image"],
            )
            break
        path = warehouse.store / "train/image/c/2/0/0/0"
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        seen: list[Any] = []
        with pytest.raises(CorruptError, match="image/c/2"):
            collect((batch["index"].tolist() for batch in loader), seen)
        assert seen == [list(range(at, at + 4)) for at in range(0, 16, 4)], (
            "what came before the damage is delivered"
        )
        assert loader.state_dict()["position"] == 4
        path.write_bytes(good)
        assert sum(len(batch["index"]) for batch in loader) == 29
        assert loader.stats.fallback_buffers == 0, "the ring has slots for the copies under way"
    assert device.locked == 0, "close() unlocks the ring"


def test_a_gpu_that_is_not_there_is_refused(small: Warehouse) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="no CUDA"):
        ChunkLoader(small.split("train"), 4, device="cuda")


def test_a_device_torch_does_not_know_is_refused(small: Warehouse) -> None:
    with pytest.raises(ConfigError, match="unknown device"):
        ChunkLoader(small.split("train"), 4, device="cudda")
    with ChunkLoader(small.split("train"), 4, engine="inline", device="cpu") as loader:
        assert sum(len(batch["index"]) for batch in loader) == 29


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("engine", ["inline", "thread", "spawn"])
def test_batches_on_a_gpu_are_those_of_the_host(small: Warehouse, engine: Any) -> None:
    with (
        ChunkLoader(
            small.split("train"), 2, engine=engine, num_workers=2, store="mmap", device="cuda"
        ) as loader,
        ChunkLoader(small.split("train"), 2, engine="inline", store="mmap") as plain,
    ):
        assert isinstance(loader.copier, DeviceCopier)
        assert isinstance(loader.copier.device, CudaDevice)
        for got, want in zip(loader, plain, strict=True):
            assert all(tensor.device.type == "cuda" for tensor in got.values())
            assert all(torch.equal(got[name].cpu(), want[name]) for name in want)
        assert loader.copier.unlock is not None, "the ring is page-locked"
