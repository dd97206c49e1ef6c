"""The same as manifold with the whole loss, of which the three published terms are samples.

``manifold_full`` compares the similarities of all tokens of a batch by Gram matrices.
"""

from __future__ import annotations

from vitprune_fast.recipes import manifold
from vitprune_fast.run.step import Recipe

_SETTINGS = manifold.RECIPE.settings
RECIPE = Recipe(
    "manifold-full",
    manifold.steps,
    {**_SETTINGS, "distill": {**_SETTINGS["distill"], "loss": ["soft", "manifold_full"]}},
    manifold.RECIPE.presets,
)
