"""Heads and neurons first, then whole blocks, each followed by distillation.

data  dense  [teacher]  score-1 plan-1 prune-1 distill-1  score plan prune distill  evaluate  report

After Zheng et al., "Pruning and distillation in width and depth for Vision Transformers" (Journal
of Xidian University 2025 no. 4), of which only the abstract is public: heads and neurons by what
the loss changes without them, distillation in width, then in depth, at 70 % of the parameters and
of the multiply-accumulates. What that leaves open is done as in DynaBERT (Hou et al. 2020,
arXiv:2004.04037): the second teacher is the model that the first stage made.

Blocks go by how far the output moves without each of them. What the loss rises would be noise on
images that the model fits.
"""

from __future__ import annotations

from typing import Any

from vitprune_fast.config.run import RunConfig
from vitprune_fast.recipes.standard import (
    judged,
    opened,
    require,
    scored,
    smaller,
    taught,
    toward,
)
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
        taught([*found.values()][-1], teachers, whole="model-1", cut="plan.json"),
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
    require("width-depth", rules)


_LOSS = {
    "loss": ["soft", "hidden"],
    "loss_weights": [1.0, 0.1],
    "alpha": 0.9,
    "temperature": 4.0,
}
_WEIGHTS = "augreg_in21k_ft_in1k"

RECIPE = Recipe(
    "width-depth",
    steps,
    {
        "score": {"reduction": "abs"},
        # ten of twelve blocks, and as much in width, see docs/recipes/width-depth.md
        "plan": {"macs": 0.7, "params": 0.7, "allocation": "uniform"},
        "rounds": {"count": 2, "epochs": 100, "split": [0.53]},
        "sweep": {"compensate": False},
        "distill": {"epochs": 100, **_LOSS},
    },
    {
        "digits": {"rounds": {"epochs": 15}, "distill": {"epochs": 15}},
        "smoke": {
            "plan": {"macs": 0.5, "params": None},
            "rounds": {"epochs": 4, "split": [0.6]},
            "distill": {"epochs": 4},
        },
        "images": {"rounds": {"epochs": 10}, "distill": {"epochs": 10}},
        "cifar-vit-s": {"model": {"name": f"vit_small_patch16_224.{_WEIGHTS}"}},
        "cifar-vit-b": {"model": {"name": f"vit_base_patch16_224.{_WEIGHTS}"}},
        "imagenet": {"distill": {"alpha": 1.0, "temperature": 1.0}},
        "imagenet-vit-s": {"model": {"name": f"vit_small_patch16_224.{_WEIGHTS}"}},
        "imagenet-vit-b": {"model": {"name": f"vit_base_patch16_224.{_WEIGHTS}"}},
    },
)
