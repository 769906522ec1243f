"""Fixtures shared by the suite: one small published version, built once."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))
# Commands under test, in this process or their own, write their runs there and not into the working
# folder.
os.environ["WAREHOUSE_EXPERIMENTS__DB"] = os.path.join(
    tempfile.mkdtemp(prefix="experiments-"), "experiments.db"
)

from fakes import DATA, build
from process_state import restored_commands, shared_state

from warehouse import Warehouse


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """29 train pictures in chunks of 8, 8, 8, 5 and 9 val pictures in 8, 1."""
    return build(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not DATA.is_dir():
        pytest.skip("the folder of real data (../shared/data) is not here")
    return DATA


@pytest.fixture(autouse=True)
def _process_as_found() -> Iterator[None]:
    """Tests share one process: what a test leaves behind decides over those that run after it."""
    before = shared_state()
    with restored_commands():
        yield
    after = shared_state()
    # A test may be the first to import PyTorch.
    before.setdefault("PyTorch threads", after.get("PyTorch threads"))
    after.setdefault("PyTorch threads", None)
    assert after == before, "the test left something changed behind"


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Compute on one PyTorch thread, as a process started with OMP_NUM_THREADS=1 does.

    The number of threads decides how a sum is rounded, and a rounding decides which of two equally
    near codes a vector gets. Two runs are comparable only if both have the same number.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
