"""Where build tasks run: in this process, on its threads, on local worker processes, or on a Dask
cluster that is running already.

All of them give `run(function, tasks)`, an iterator of (task, result) in the order of completion.
Local workers start in the background as soon as a `task_runner` is entered, while the caller still
plans, and may end in the background too; whatever ends the `with` block (an error, Ctrl-C) ends
them. Given up: workers that start for a build that turns out to have nothing to do.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any, Protocol, TypeVar

from warehouse.errors import BuildError

__all__ = ["RunAll", "TaskRunner", "run_here", "task_runner"]

Task = TypeVar("Task")
Result = TypeVar("Result")
MOST_THREADS = 4
"""Up to so many workers are threads where tasks allow it: decoders, Blosc and hashes let go of the
GIL, and two Dask processes take a second of two cores to start. The share of a task that holds the
GIL, about a tenth, is why more of them are processes."""
FIRST_WORKERS = 2
"""Started before the number of tasks is known; the others follow with the first tasks."""
WORKER_ENVIRONMENT = {
    # Dask's own threshold of 64 KiB gives every picture's memory back to the kernel, and each page
    # of the next one is a fault: half of a build's decoding. A worker keeps at most so much that is
    # free; what is larger than 32 MiB still goes back at once.
    "MALLOC_TRIM_THRESHOLD_": 64 << 20,
    "MALLOC_MMAP_THRESHOLD_": 32 << 20,
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), 1),
}
SET_BY_DASK = (*WORKER_ENVIRONMENT, "PYTHONHASHSEED", "__DASK_PARENT_PID")
"""Environment variables that Dask sets in this process, for its workers to inherit."""
OPTIONS = {
    "distributed.worker.daemon": True,
    "distributed.worker.profile.enabled": False,
    "distributed.comm.timeouts.connect": "30s",
    "distributed.scheduler.allowed-failures": 1,
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT,
}


class RunAll(Protocol):
    """(function, tasks) -> (task, result) of each, in the order of completion."""

    def __call__(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], /
    ) -> Iterable[tuple[Any, Any]]: ...


def run_here(
    function: Callable[[Task], Result], tasks: Sequence[Task]
) -> Iterator[tuple[Task, Result]]:
    """One task after the other, in this process."""
    for task in tasks:
        yield task, function(task)


def _run_on_threads(
    function: Callable[[Task], Result], tasks: Sequence[Task], threads: int
) -> Iterator[tuple[Task, Result]]:
    """Whatever ends the iteration waits for the tasks under way."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="bake")
    try:
        futures = {pool.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class TaskRunner:
    """A `RunAll` over Dask workers that start in the background.

    Call `release_workers` once no more tasks will come. A runner belongs to one thread.
    """

    def __init__(
        self, workers: int, cluster: str | None, preload: Callable[[], None] | None, threads: bool
    ) -> None:
        self.workers, self.cluster, self.preload = workers, cluster, preload
        self.stack = ExitStack()
        self.local: Any = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="cluster")
        self.threads = workers if threads and cluster is None and workers <= MOST_THREADS else 0
        self.here = cluster is None and (workers == 0 or self.threads > 0)
        if preload is not None and (self.threads or not self.here):
            # OpenCV's import puts its own folder first in sys.path for a moment: what is imported
            # or started meanwhile inherits it, and takes OpenCV's `typing` and `utils`. Nothing is
            # left to import when workers start.
            preload()
        self.started: Future[Any] | None = None if self.here else self.thread.submit(self._start)

    def __call__(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], /
    ) -> Iterator[tuple[Any, Any]]:
        """Raises BuildError: no scheduler answers, a worker died."""
        if not tasks:
            return
        if self.started is None:
            yield from (
                _run_on_threads(function, tasks, self.threads)
                if self.threads
                else run_here(function, tasks)
            )
            return
        client = self.started.result()
        if self.local is not None and min(self.workers, len(tasks)) > FIRST_WORKERS:
            self.local.scale(min(self.workers, len(tasks)))
        count = (
            self.workers
            if self.local is not None
            else len(client.scheduler_info(n_workers=-1)["workers"])
        )
        yield from _run_on(client, function, tasks, max(1, count))

    def run_in_background(self, function: Callable[[], None]) -> None:
        """Call `function` in the background once the workers are up.

        Until then it would only slow their start.
        """
        self.thread.submit(function)

    def release_workers(self) -> None:
        self.thread.submit(self.stack.close)

    def close(self) -> None:
        self.release_workers()
        self.thread.shutdown()

    def _start(self) -> Any:
        import dask
        from distributed import Client, LocalCluster

        # Importing distributed resets the level; its messages on workers coming and going say
        # nothing to a user.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        self.stack.enter_context(dask.config.set(OPTIONS))
        self.stack.enter_context(_restored_environment(SET_BY_DASK))
        try:
            if self.cluster is None:
                scratch = self.stack.enter_context(
                    tempfile.TemporaryDirectory(
                        prefix="tensor-warehouse-", ignore_cleanup_errors=True
                    )
                )
                with _inherited_deafness_to_ctrl_c():
                    self.local = self.stack.enter_context(
                        LocalCluster(
                            n_workers=min(self.workers, FIRST_WORKERS),
                            threads_per_worker=1,
                            processes=True,
                            memory_limit=0,
                            local_directory=scratch,
                            dashboard_address=None,
                            worker_dashboard_address=None,
                            scheduler_kwargs={"dashboard": False},
                            silence_logs=logging.CRITICAL,
                        )
                    )
            client = self.stack.enter_context(
                Client(self.cluster or self.local, timeout="20s", set_as_default=False)
            )
            client.wait_for_workers(1, timeout=20)
            if self.preload is not None:
                client.run(self.preload, wait=False, on_error="ignore")
        except (OSError, TimeoutError, RuntimeError, ValueError) as error:
            raise BuildError(
                "no Dask scheduler with workers answers",
                where=self.cluster or "local processes",
                found=f"{error}"[:120] or type(error).__name__,
                remedy=(
                    "start one (dask scheduler, dask worker), or omit --build.cluster; "
                    "--build.workers 0 needs none"
                ),
            ) from None
        return client


@contextmanager
def task_runner(
    workers: int,
    cluster: str | None,
    preload: Callable[[], None] | None = None,
    *,
    threads: bool = False,
) -> Iterator[TaskRunner]:
    """Start the workers of a build, and end them with the block.

    Parameters
    ----------
    workers
        Local workers; 0 runs tasks in this process.
    cluster
        Address of a running scheduler, which is used instead of local workers.
    preload
        Imports what tasks need. Called here before any worker starts, and in each worker that is
        there at the start, before its first task; must be importable there.
    threads
        Whether tasks may run beside each other in one process. A few workers are threads then.
    """
    runner = TaskRunner(workers, cluster, preload, threads)
    try:
        yield runner
    finally:
        runner.close()


@contextmanager
def _restored_environment(names: Sequence[str]) -> Iterator[None]:
    """On the way out, give the environment variables `names` the values they had on entry.

    Dask leaves its workers' variables behind. A program that builds a version and then trains would
    load PyTorch, or start loader processes, with OMP_NUM_THREADS=1.
    """
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _inherited_deafness_to_ctrl_c() -> Iterator[None]:
    """Processes started inside inherit a blocked SIGINT.

    Ctrl-C reaches this process alone, which ends them in order.
    """
    if sys.platform == "win32":
        yield
        return
    # Started later, the tracker would unblock the signal again in the thread that starts the
    # workers.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_on(
    client: Any, function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    from distributed import as_completed as as_computed
    from distributed.scheduler import KilledWorker

    # A few tasks a worker in flight: records travel just before they are needed, whatever the
    # number of chunks.
    ahead = 3 * workers
    waiting = iter(tasks)
    by_key: dict[str, Task] = {}

    def submit() -> Any:
        task = next(waiting)
        future = client.submit(function, task, pure=False, retries=0)
        by_key[future.key] = task
        return future

    first = min(ahead, len(tasks))
    left = len(tasks) - first
    running = as_computed([submit() for _ in range(first)], loop=client.loop)
    for future in running:
        try:
            result = future.result()
        except (KilledWorker, CancelledError):
            raise BuildError(
                "a build worker died",
                found=f"while baking {by_key[future.key]!r}"[:100],
                remedy=(
                    "look for the out-of-memory killer; "
                    "lower --build.workers and run the same command again"
                ),
            ) from None
        yield by_key.pop(future.key), result
        if left:
            left -= 1
            running.add(submit())
