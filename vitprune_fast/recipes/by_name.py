"""Finds recipes: a module of this folder with ``RECIPE``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune_fast.errors import InvalidInput

if TYPE_CHECKING:
    from vitprune_fast.run.step import Recipe

_NO_RECIPES = ("__init__", "by_name", "presets", "start")


def names() -> list[str]:
    """The recipes there are."""
    files = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    return [name.replace("_", "-") for name in files if name not in _NO_RECIPES]


def named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in names():
        raise InvalidInput(f"run: recipe must be one of {', '.join(names())}, got {name!r}")
    return import_module(f"{__package__}.{name.replace('-', '_')}").RECIPE
