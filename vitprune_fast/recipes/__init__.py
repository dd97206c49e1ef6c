"""The methods as data, and `run`: the chain from a dense model to a smaller, distilled one.

Importing this package is light (no torch); `run` is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprune_fast.recipes.chain import run
    from vitprune_fast.recipes.config import RunConfig
    from vitprune_fast.recipes.presets import preset

__all__ = ["RunConfig", "preset", "run"]

_HOMES = {"RunConfig": "config", "preset": "presets", "run": "chain"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
