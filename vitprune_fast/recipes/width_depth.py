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
from vitprune_fast.structure import DEPTH_KINDS


def steps(config: RunConfig) -> list[Step]:
    """Two rounds of the standard steps; kinds of depth are cut in the second alone."""
    _check(config)
    width = [kind for kind in config.plan.units if kind not in DEPTH_KINDS]
    depth = [kind for kind in config.plan.units if kind in DEPTH_KINDS] or ["block"]
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
    """Of one of the rounds, which cuts these kinds alone, within their own bounds."""
    plan = toward(config, number).get("plan", {})
    own = {
        name: {kind: value for kind, value in getattr(config.plan, name).items() if kind in kinds}
        for name in ("keep", "bounds")
    }
    return {"plan": {**plan, "units": kinds, **own}, "score": {"units": kinds}}


def _check(config: RunConfig) -> None:
    """Refuses what does not go with two rounds, each of other kinds."""
    plan, rounds = config.plan, config.rounds
    sides = [{*plan.units} - {*DEPTH_KINDS}, ({*plan.units} & {*DEPTH_KINDS}) or {"block"}]
    by_cost = plan.macs is not None or plan.params is not None
    rules = {
        "gates": (config.gates.kind == "none", "be none", config.gates.kind),
        "mask-macs": (config.masks.macs is None, "be unset", config.masks.macs),
        "round-masks": (not rounds.masks, "be off", "on"),
        "rounds": (rounds.count == 2, "be 2", rounds.count),
        "cut-units": (bool(sides[0]), "name a kind of width, such as neuron", plan.units),
        "keep": (
            not plan.keep or by_cost or all(side & plan.keep.keys() for side in sides),
            "name kinds of width and of depth where neither macs nor params are given",
            plan.keep,
        ),
        "bounds": (
            plan.bounds.keys() <= sides[0] | sides[1],
            "be of kinds, since each round cuts others",
            plan.bounds,
        ),
    }
    for name, (holds, rule, got) in rules.items():
        if not holds:
            raise InvalidInput(f"run: {name} must {rule} for the recipe width-depth, got {got}")


RECIPE = Recipe("width-depth", steps, {"rounds": {"count": 2}})
