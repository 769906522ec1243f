"""Which code, process and machine a run belongs to, and whether the process still exists.

Purpose: `process_facts` for a row of the experiment log; `is_alive` for a run that is recorded as
  running.
Used by: utils.tracking.experiment_log
Design notes: a process is known by its number and its start together. Nothing is imported for its
  version, and a checkout without git, or an installed package, has no commit.
Assistant guidance: when extending: a fact that every run shares belongs into `machine`, which is
  JSON, and needs no new column.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from warehouse.format.manifest import code_version

__all__ = ["is_alive", "process_facts"]

ROOT = Path(__file__).parents[2]
LOST_AFTER_S = 600.0
"""Silence after which a run on another host is taken for lost."""


def process_facts() -> dict[str, object]:
    """Return what identifies the code and the process that runs it, by column of `runs`."""
    process = psutil.Process()
    return {
        "code_version": code_version(),
        "code_commit": _commit(),
        "host": socket.gethostname(),
        "pid": process.pid,
        # Numbers of processes are used again; number and start together are not.
        "pid_started": process.create_time(),
        "machine": json.dumps(_machine()),
    }


def is_alive(*, host: str, pid: int, pid_started: float, updated: float) -> bool:
    """Return whether the process that records a run still exists.

    Parameters
    ----------
    pid_started
        Unix time at which the process with this number started.
    updated
        Unix time of the last write, which decides on another host than this one.
    """
    # The processes of another host cannot be listed from here.
    if host != socket.gethostname():
        return time.time() - updated < LOST_AFTER_S
    with contextlib.suppress(psutil.Error):
        # The kernel's start times come from its clock of boot, which an adjusted clock moves.
        return abs(float(psutil.Process(pid).create_time()) - pid_started) < 1
    return False


def _machine() -> dict[str, object]:
    # Importing one of these for its version would cost seconds, so only what is there is asked.
    versions: dict[str, str] = {
        name: str(getattr(sys.modules[name], "__version__", ""))
        for name in ("torch", "numpy", "zarr")
        if name in sys.modules
    }
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        **versions,
    }


def _commit() -> str | None:
    """The commit of a checkout, with "+" if tracked files differ from it.

    None for an installed package.
    """
    if not (ROOT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
