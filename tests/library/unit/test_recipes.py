"""A recipe says what a release trains with: its preset exists, and each of its values names a file."""

from __future__ import annotations

import dataclasses

import pytest

import moepeft
from moepeft.config import Recipe, recipes
from moepeft.errors import ConfigError
from moepeft.registry import factory_class

RECIPES = [(name, setting) for name in moepeft.available() for setting in recipes(factory_class(name))]


@pytest.mark.parametrize(("name", "setting"), RECIPES)
def test_recipe_is_a_preset_and_values_that_exist(name: str, setting: str) -> None:
    recipe = recipes(factory_class(name))[setting]
    factory = moepeft.method(f"{name}@{recipe.preset}")
    of_factory = {field.name for field in dataclasses.fields(factory)}  # type: ignore[arg-type]
    of_recipe = {field.name for field in dataclasses.fields(recipe)}
    assert set(recipe.sources) <= of_factory | of_recipe
    assert recipe.learning_rate is not None
    assert ("dropout" in recipe.sources) == ("dropout" in of_factory)


def test_recipe_refuses_a_value_without_its_source() -> None:
    with pytest.raises(ConfigError, match="sources has no batch_size, learning_rate"):
        Recipe(preset="released", sources={"epochs": "train.sh"}, epochs=1, learning_rate=1e-4, batch_size=8)
