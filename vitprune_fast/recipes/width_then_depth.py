"""Heads and neurons first, then whole blocks, each followed by teaching.

data  dense  [teacher]  score-1 plan-1 prune-1 sweep-1 distill-1  score plan prune sweep distill ...

The way of DynaBERT (Hou et al. 2020, arXiv:2004.04037): the first half of the way to the budget is
gone in width, the rest in depth, by how far the output moves without each block. What the loss
rises would be noise on images that the model fits.
"""

from __future__ import annotations

from typing import Any

from vitprune_fast.config.run import RunConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.standard import judged, opened, scored, smaller, taught, toward
from vitprune_fast.run.step import Recipe, Step

_DEPTH = ("attn_branch", "mlp_branch", "block")


def steps(config: RunConfig) -> list[Step]:
    """Two rounds of the standard steps; kinds of depth are cut in the second alone."""
    _check(config)
    width = [kind for kind in config.plan.units if kind not in _DEPTH]
    depth = [kind for kind in config.plan.units if kind in _DEPTH] or ["block"]
    first = _settings(config, 1, width)
    second = _settings(config, 2, depth)
    # blocks are few enough to be left out one by one
    second["score"] |= {"criterion": "kl", "reduction": None}
    if config.rounds.epochs:
        first["distill"] = {"epochs": config.rounds.epochs}
    made, teachers = opened(config)
    of_width, models = smaller(config, "dense", "-1", first)
    narrow = [*models.values()][-1]
    of_depth, found = smaller(config, "model-1", settings=second)
    rows = {**models, "taught-1": "model-1", **found}
    return [
        *made,
        *scored("dense", "-1", first),
        *of_width,
        taught(narrow, teachers, "-1", first),
        *scored("model-1", settings=second),
        *of_depth,
        taught([*found.values()][-1], teachers),
        *judged({"before": "dense", **rows, "after": "model"}),
    ]


def _settings(config: RunConfig, number: int, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Of one of the rounds, which cuts these kinds alone."""
    plan = toward(config, number).get("plan", {})
    keep = {kind: share for kind, share in config.plan.keep.items() if kind in kinds}
    return {"plan": {**plan, "units": kinds, "keep": keep}, "score": {"units": kinds}}


def _check(config: RunConfig) -> None:
    clash = {
        "gates": config.gates.kind != "none",
        "mask-macs": config.masks.macs is not None,
        "round-masks": config.rounds.masks,
        "rounds of another number than 2": config.rounds.count != 2,
    }
    if not {*config.plan.units} - {*_DEPTH}:
        raise InvalidInput(
            "run: cut-units must name a kind of width, such as neuron, for the recipe "
            f"width-then-depth, got {', '.join(config.plan.units)}"
        )
    if found := [name for name, given in clash.items() if given]:
        raise InvalidInput(
            f"run: {found[0]} must not be given with the recipe width-then-depth, which cuts twice"
        )


RECIPE = Recipe("width-then-depth", steps, {"rounds": {"count": 2}})
