"""Fixtures of the tests of segment_patches, a plugin of pytest.

Small pictures, the command, a finished run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from segment_fakes import Outcome, call, flags

from ingest.synthetic.make import make_sample
from ingest.synthetic.settings import SampleSettings


@pytest.fixture
def segment(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command as its command line would run it: (exit code, result, last line of stderr)."""

    def once(folder: Path, output: Path, **more: Any) -> Outcome:
        capsys.readouterr()
        code = call(*flags(folder, output, **more))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        lines = out.strip().splitlines()
        return code, json.loads(lines[-1]) if lines else None, err.strip().splitlines()[-1]

    return once


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six colour pictures of 70 x 90 with masks, of sides that are no multiple of anything, and one
    of 100 x 64 without a mask.
    """
    root = tmp_path_factory.mktemp("pictures") / "in"
    make_sample(SampleSettings(kind="masks", count=6, size=(70, 90), output=str(root)))
    make_sample(
        SampleSettings(
            kind="masks", count=1, size=(100, 64), seed=5, output=str(root.parent / "more")
        )
    )
    shutil.copy(root.parent / "more" / "images" / "scene_00000.png", root / "images" / "free.png")
    return root


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted run."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert call(*flags(pictures, output)) == 0
    return output
