"""Unchanged sources and settings keep the names of their versions.

The recipes that release 0.1 wrote are compared with those of the present code.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from recipe_builds import VARYING, build_recipes, name_of

ROOT = Path(__file__).resolve().parents[2]
STORED: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "recipes_0_1.json").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same versions, built by the present code."""
    return build_recipes(ROOT, tmp_path_factory.mktemp("recipes"))


def structure(value: Any) -> Any:
    """Replace every leaf by the name of its type."""
    if isinstance(value, dict):
        return {key: structure(each) for key, each in value.items()}
    if isinstance(value, list):
        return [structure(each) for each in value]
    return type(value).__name__


def with_stored_values(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Replace what depends on the machine by what it was when the recipe was stored."""
    out = copy.deepcopy(recipe)
    for path in VARYING[name]:
        *parents, last = path.split(".")
        place, stored = out, STORED[name]["recipe"]
        for key in parents:
            place, stored = place[key], stored[key]
        assert last in place, f"{path} is no longer in the recipe"
        place[last] = stored[last]
    return out


def test_every_stored_recipe_is_built() -> None:
    assert set(STORED) == set(VARYING)
    assert len(STORED) >= 5


@pytest.mark.parametrize("name", STORED)
def test_a_name_is_the_hash_of_its_recipe(name: str, built: dict[str, dict[str, Any]]) -> None:
    for each in (STORED[name], built[name]):
        assert name_of(each["recipe"]) == each["version"]


@pytest.mark.parametrize("name", STORED)
def test_the_recipe_is_that_of_release_0_1(name: str, built: dict[str, dict[str, Any]]) -> None:
    recipe, stored = built[name]["recipe"], STORED[name]["recipe"]
    assert structure(recipe) == structure(stored)

    recipe = with_stored_values(name, recipe)
    assert recipe == stored
    assert name_of(recipe) == STORED[name]["version"]
