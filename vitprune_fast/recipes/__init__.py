"""The ways to a smaller model as data, one file each, found by their name.

A recipe is a module here with ``RECIPE``, a list of steps with the settings it comes with.
Importing this package is light (no torch); a recipe, and `run`, are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprune_fast.config.run import RunConfig
    from vitprune_fast.recipes.by_name import named, names
    from vitprune_fast.recipes.presets import preset
    from vitprune_fast.recipes.start import run
    from vitprune_fast.run.step import Recipe, Step

__all__ = ["Recipe", "RunConfig", "Step", "named", "names", "preset", "run"]

_HOMES = {
    "Recipe": "vitprune_fast.run.step",
    "RunConfig": "vitprune_fast.config.run",
    "Step": "vitprune_fast.run.step",
    "named": f"{__name__}.by_name",
    "names": f"{__name__}.by_name",
    "preset": f"{__name__}.presets",
    "run": f"{__name__}.start",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
