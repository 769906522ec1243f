"""Copies of batches to a GPU: from a page-locked ring, on their own stream, one batch ahead.

Purpose: `DeviceCopier.run(batches, tensors)` yields each batch with its tensors on the device,
  while the next one is being copied.
Used by: utils.loader
Design notes: a copy reads the ring buffer after the call that started it has returned. The host
  tensors are therefore kept until the copy's event has passed; only then is the buffer free. At
  most COPIES_PENDING copies are pending; beyond that the oldest is waited for. All CUDA calls are
  in `CudaDevice`, so that the order of events can be tested without a GPU. They follow the
  documentation of torch.Tensor.record_stream (memory allocated on a side stream) and
  torch.cuda.cudart (cudaHostRegister of existing memory). CudaDevice itself has not run on a GPU
  yet.
Assistant guidance: when extending: nothing may be yielded before the consumer's stream waits for
  its copy, and no host tensor let go before its event; whatever ends an epoch, `run` waits for the
  copies under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch

from utils.log import get_log
from warehouse.errors import ConfigError

__all__ = ["COPIES_PENDING", "CudaDevice", "Device", "DeviceCopier", "open_device"]

log = get_log(__name__)
T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
COPIES_PENDING = 2
"""Batches whose host memory a copy may still read; the ring has this many more buffers."""


class Passed(Protocol):
    """A CUDA event after a copy, which tells when the copy is done."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


@runtime_checkable
class Device(Protocol):
    """What a copier asks of a GPU."""

    def lock(self, memory: Any) -> Callable[[], None] | None:
        """Page-lock a buffer; return what unlocks it, or None if it cannot be locked."""

    def copy(self, host: Tensors) -> tuple[Tensors, Passed]:
        """Start copying on the side stream.

        Returns the copies, which must not be used yet, and the event after them.
        """

    def hand_over(self, copies: Tensors, event: Passed) -> None:
        """Make the consumer's stream wait for the event, and tell the allocator that it uses the
        copies.
        """


class CudaDevice:
    """One CUDA device, and a side stream on it.

    Raises
    ------
    ConfigError
        If there is no such device.
    """

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            found = (
                f"{torch.cuda.device_count()} CUDA devices"
                if torch.cuda.is_available()
                else "no CUDA"
            )
            raise ConfigError(
                f"no device {device}", found=found, remedy="leave `device` out, or use cpu"
            )
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        )
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def lock(self, memory: Any) -> Callable[[], None] | None:
        # The existing memory, since tensor.pin_memory() would make a copy of each batch.
        view = np.frombuffer(memory, np.uint8)
        address, size, cudart = view.ctypes.data, view.nbytes, _cuda_runtime()
        with torch.cuda.device(self.device):
            code = int(cudart.cudaHostRegister(address, size, 0))
        if code:
            log.warning(
                "the ring of %.0f MB cannot be page-locked (CUDA error %d): copies will be slower",
                size / 1e6,
                code,
            )
            return None

        def unlock() -> None:
            # Memory that a copy still reads must not be unlocked.
            self.stream.synchronize()
            cudart.cudaHostUnregister(address)

        return unlock

    def copy(self, host: Tensors) -> tuple[Tensors, Passed]:
        with torch.cuda.stream(self.stream):
            copies = {
                name: tensor.to(self.device, non_blocking=True) for name, tensor in host.items()
            }
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return copies, event

    def hand_over(self, copies: Tensors, event: Passed) -> None:
        stream = torch.cuda.current_stream(self.device)
        # The GPU waits, not this thread. record_stream keeps the allocator from giving the memory
        # to the side stream's next copy while the consumer's kernels still read it.
        stream.wait_event(cast(torch.cuda.Event, event))
        for tensor in copies.values():
            tensor.record_stream(stream)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def open_device(device: Any) -> tuple[torch.device | None, Device | None]:
    """Decide how batches get to a device.

    Parameters
    ----------
    device
        None, a torch device or its name, or a `Device`.

    Returns
    -------
    tuple
        The torch device for blocking copies, and the `Device` that copies ahead; at least one of
        them is None.

    Raises
    ------
    ConfigError
        If torch does not know the device.
    """
    if device is None or isinstance(device, Device):
        return None, device
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            "unknown device", expected="cpu, cuda, cuda:0, ...", found=f"{error}".split("\n", 1)[0]
        ) from None
    return (None, CudaDevice(found)) if found.type == "cuda" else (found, None)


class DeviceCopier:
    """Copy batches to a device, one batch ahead of the consumer.

    Parameters
    ----------
    device
        Where to copy to.
    memory
        The ring of batches, which is page-locked from the first epoch until `close`.
    """

    def __init__(self, device: Device, memory: Any) -> None:
        self.device, self.memory = device, memory
        self.unlock: Callable[[], None] | None = None
        self.tried = False
        self.pending: deque[tuple[Passed, Tensors]] = deque()

    def run(
        self, batches: Iterator[T], tensors: Callable[[T], Tensors]
    ) -> Generator[tuple[T, Tensors], None, None]:
        """Yield each batch with its tensors on the device, in the order of `batches`.

        An exception of `batches` is raised after the batches that came before it.

        Parameters
        ----------
        batches
            The filled batches.
        tensors
            Takes the host tensors out of a batch.
        """
        # At the first epoch: a loader that is only asked for its length locks no memory.
        if not self.tried:
            self.tried, self.unlock = True, self.device.lock(self.memory)
        ahead: tuple[T, Tensors, Passed] | None = None
        failure: BaseException | None = None
        try:
            while True:
                try:
                    batch = next(batches, None)
                except Exception as error:
                    batch, failure = None, error
                # The next copy starts before the former batch is handed out, so that it runs while
                # the consumer computes.
                started = None if batch is None else (batch, *self._start(tensors(batch)))
                # The generator's own names would keep the ring buffer in use while it is suspended.
                del batch
                if ahead is not None:
                    taken, copies, event = ahead
                    ahead = started
                    self.device.hand_over(copies, event)
                    yield taken, copies
                    del taken, copies, event
                else:
                    ahead = started
                if started is None:
                    break
            if failure is not None:
                raise failure
        finally:
            # However the epoch ends, no copy may still read a buffer that is filled again.
            self._settle()

    def _start(self, host: Tensors) -> tuple[Tensors, Passed]:
        while self.pending and (len(self.pending) >= COPIES_PENDING or self.pending[0][0].query()):
            self.pending[0][0].synchronize()
            self.pending.popleft()
        copies, event = self.device.copy(host)
        self.pending.append((event, host))
        return copies, event

    def _settle(self) -> None:
        while self.pending:
            self.pending[0][0].synchronize()
            self.pending.popleft()

    def close(self) -> None:
        """Wait for pending copies, and unlock the ring."""
        self._settle()
        if self.unlock is not None:
            self.unlock()
            self.unlock = None
        self.memory = None
