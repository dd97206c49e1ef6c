"""One ratio for heads and neurons: what `auto-ratio` is compared with.

Steps are those of `auto-ratio`; the ratio is the largest that the tolerance allows, or the smallest
that meets `search.macs`.
"""

from __future__ import annotations

from vitprune_fast.recipes import auto_ratio
from vitprune_fast.run.step import Recipe

RECIPE = Recipe(
    "fixed-ratio",
    auto_ratio.steps,
    {**auto_ratio.RECIPE.settings, "search": {"mode": "fixed"}},
    auto_ratio.PRESETS,
)
