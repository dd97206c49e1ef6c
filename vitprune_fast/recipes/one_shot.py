"""A smaller model without training: score, plan, cut, refit what stays."""

from __future__ import annotations

from vitprune_fast.config.run import RunConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.standard import chosen, judged, opened
from vitprune_fast.run.step import Recipe, Step


def steps(config: RunConfig) -> list[Step]:
    """The standard steps without distillation."""
    if config.masks.macs is not None:
        raise InvalidInput(
            "run: mask-macs must not be given with the recipe one-shot, which trains nothing, got "
            f"{config.masks.macs}; take the recipe standard"
        )
    trains = config.gates.kind != "none" or config.rounds.epochs > 0
    made, teachers = opened(config, taught=trains)
    smaller, models = chosen(config, teachers)
    *way, last = models.items()
    rows = {**dict(way), "after": last[1]}
    return [*made, *smaller, *judged({"before": "dense", **rows})]


RECIPE = Recipe("one-shot", steps)
