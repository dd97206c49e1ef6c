"""Our own: scores of one backward, a plan, the cut, the sweep, and then distillation.

The default. Steps are those of `standard`, which the settings choose among.
"""

from __future__ import annotations

from vitprune_fast.recipes.standard import steps
from vitprune_fast.run.step import Recipe

RECIPE = Recipe("fast", steps)
