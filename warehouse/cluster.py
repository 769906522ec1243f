"""Where build tasks run: in this process, on local worker processes, or on a Dask cluster that is running already.

All three give `run(function, tasks)`, an iterator of (task, result) in the order of completion. Whatever ends the iteration
(an error, Ctrl-C) ends the local workers too.
"""

from __future__ import annotations

import itertools
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

from warehouse import durable
from warehouse.errors import BuildError

__all__ = ["task_runner"]

Task = TypeVar("Task")
Result = TypeVar("Result")
OPTIONS = {
    "distributed.worker.daemon": True,
    "distributed.comm.timeouts.connect": "30s",
    "distributed.scheduler.allowed-failures": 1,
    "distributed.worker.multiprocessing-method": "spawn",
}


@contextmanager
def task_runner(workers: int, cluster: str | None, scratch: Path, tasks: int) -> Iterator[Callable[..., Iterator[tuple[Any, Any]]]]:
    """workers: local processes, 0 for this one. cluster: a scheduler's address, which wins over workers. Raises BuildError."""
    if tasks == 0 or (workers == 0 and cluster is None):
        yield lambda function, todo: ((task, function(task)) for task in todo)
        return
    import dask
    from distributed import Client, LocalCluster

    # Importing distributed resets the level; its messages on workers coming and going say nothing to a user.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(OPTIONS))
        try:
            if cluster is None:
                with _inherited_deafness_to_ctrl_c():
                    local = LocalCluster(
                        n_workers=min(workers, tasks),
                        threads_per_worker=1,
                        processes=True,
                        memory_limit=0,
                        local_directory=str(scratch),
                        dashboard_address=None,
                        worker_dashboard_address=None,
                        scheduler_kwargs={"dashboard": False},
                        silence_logs=logging.CRITICAL,
                    )
                stack.callback(durable.remove_tree, scratch)
                stack.enter_context(local)
            client = stack.enter_context(Client(cluster or local, timeout="20s", set_as_default=False))
            client.wait_for_workers(1, timeout=20)
        except (OSError, TimeoutError, RuntimeError, ValueError) as error:
            raise BuildError(
                "no Dask scheduler with workers answers",
                where=cluster or "local processes",
                found=f"{error}"[:120] or type(error).__name__,
                remedy="start one (dask scheduler, dask worker), or leave --build.cluster away; --build.workers 0 needs none",
            ) from None
        yield partial(_run_on, client)


@contextmanager
def _inherited_deafness_to_ctrl_c() -> Iterator[None]:
    """Processes started inside inherit a blocked SIGINT: Ctrl-C reaches this process alone, which ends them in order."""
    if sys.platform == "win32":
        yield
        return
    # Started later, the tracker would unblock the signal again in the thread that starts the workers.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_on(client: Any, function: Callable[[Task], Result], tasks: list[Task]) -> Iterator[tuple[Task, Result]]:
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    # A few tasks a worker in flight: records travel just before they are needed, whatever the number of chunks.
    ahead = 3 * max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
    waiting = iter(tasks)
    by_key: dict[str, Task] = {}

    def submit() -> Any:
        task = next(waiting)
        future = client.submit(function, task, pure=False, retries=0)
        by_key[future.key] = task
        return future

    first = min(ahead, len(tasks))
    running = as_completed([submit() for _ in range(first)], loop=client.loop)
    left = itertools.repeat(None, len(tasks) - first)
    for future in running:
        try:
            result = future.result()
        except (KilledWorker, CancelledError):
            raise BuildError(
                "a build worker died",
                found=f"while baking {by_key[future.key]!r}"[:100],
                remedy="look for the out-of-memory killer; lower --build.workers and run the same command again",
            ) from None
        yield by_key.pop(future.key), result
        for _ in itertools.islice(left, 1):
            running.add(submit())
