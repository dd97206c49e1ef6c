"""The smallest weights go, and nothing is trained: the baseline of every comparison."""

from __future__ import annotations

from vitprune_fast.config.run import RunConfig
from vitprune_fast.recipes.standard import judged, opened
from vitprune_fast.run import steps as do
from vitprune_fast.run.step import Recipe, Step


def steps(config: RunConfig) -> list[Step]:
    """Score, plan, prune."""
    made, _ = opened(config)
    model, scores, plan = (
        {"model": "dense"},
        {"scores": "scores.safetensors"},
        {"plan": "plan.json"},
    )
    return [
        *made,
        Step("score", do.score, model, scores, shared=True),
        Step("plan", do.plan, {**model, **scores}, plan),
        Step("prune", do.prune, {**model, **plan}, {"pruned": "model"}),
        *judged({"before": "dense", "after": "model"}),
    ]


RECIPE = Recipe("magnitude", steps, {"score": {"criterion": "magnitude"}})
