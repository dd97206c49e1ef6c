"""Finds recipes: a module of this folder with ``RECIPE``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitprune_fast import registry
from vitprune_fast.errors import InvalidInput

if TYPE_CHECKING:
    from vitprune_fast.run.step import Recipe

DEFAULT = "fast"
"""What `run` does where no recipe is named."""

_FOLDER = "recipes"
_NO_RECIPES = ("by_name", "presets", "start")


def names() -> list[str]:
    """The recipes there are."""
    found = registry.names(_FOLDER)
    return [name.replace("_", "-") for name in found if name not in _NO_RECIPES]


def named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in names():
        raise InvalidInput(f"run: recipe must be one of {', '.join(names())}, got {name!r}")
    return registry.named(_FOLDER, name.replace("-", "_"), "RECIPE")
