"""Names of the release before keep working, with a warning, and are the same objects."""

from __future__ import annotations

import importlib
import sys

import pytest

NAMES = [
    ("utils.tensor_cache", "utils.caching.tensor_cache", "TensorCache"),
    ("utils.tensor_cache", "utils.caching.tensor_cache", "CachedDataset"),
    ("utils.tensor_cache", "utils.caching.tensor_cache", "CacheKey"),
    ("utils.tensor_cache", "utils.caching.tensor_cache", "fingerprint"),
    ("utils.cached_loader", "utils.caching.cached_loader", "CachedLoader"),
    ("utils.experiments", "utils.tracking.experiments", "open_run"),
    ("ingest.text", "ingest.text.items", "TextItems"),
]


@pytest.mark.parametrize(("old", "new", "name"), NAMES)
def test_an_old_name_warns_and_is_the_same_object(
    old: str, new: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old.startswith("utils."):
        monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"has moved: import (it )?from {new}") as caught:
        found = getattr(importlib.import_module(old), name)
    assert len(caught) == 1
    assert found is getattr(importlib.import_module(new), name)


def test_a_name_that_never_was_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"utils\.tensor_caches"):
        importlib.import_module("utils.tensor_caches")
    with pytest.raises(AttributeError, match="TextItem'"):
        _ = importlib.import_module("ingest.text").TextItem


def test_the_warning_names_the_line_that_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "utils.cached_loader", raising=False)
    with pytest.warns(DeprecationWarning, match="has moved") as caught:
        from utils.cached_loader import CachedLoader  # type: ignore[import-not-found]  # noqa: F401
    assert caught[0].filename == __file__
