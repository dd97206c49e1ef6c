"""Separate ratios for heads and neurons, found by evaluation on validation images.

data  dense  [teacher]  score  search  prune  [sweep]  distill  evaluate  report

After Feng et al., "Automatic hyper-parameter search for Vision Transformer pruning" (PRAI 2023), of
which only the abstract is public: `docs/recipes/auto-ratio.md`. With `fixed-ratio` it shares all
but the settings.
"""

from __future__ import annotations

from vitprune_fast.config.run import RunConfig
from vitprune_fast.gates import GATED_UNITS
from vitprune_fast.recipes.standard import (
    is_unset,
    judged,
    opened,
    require,
    scored,
    smaller,
    taught,
)
from vitprune_fast.run import steps as do
from vitprune_fast.run.step import Recipe, Step


def steps(config: RunConfig) -> list[Step]:
    """The standard steps, with a search in place of the plan."""
    _check(config)
    made, teachers = opened(config)
    score, _ = scored("dense")
    goal = 1.0 if config.search.macs is None else config.search.macs
    search = Step(
        "search",
        do.search,
        {"model": "dense", "scores": "scores.safetensors"},
        {"plan": "plan.json", "search": "search.json"},
        # a goal without which no candidate could be is refused before any work
        {"plan": {"macs": goal}},
        shared=True,
    )
    # up to a tolerance any cost is right
    limit = goal if config.search.by_cost else 1.0
    cuts, models = smaller(config, "dense", settings={"plan": {"macs": limit}})
    last = [*models.values()][-1]
    rows = {"before": "dense", **models, "after": "model"}
    return [*made, score, search, *cuts, taught(last, teachers), *judged(rows)]


def _check(config: RunConfig) -> None:
    """Refuses other ways to say what goes, and another search than that of the recipe."""
    mode, fixed = config.search.mode, config.recipe == "fixed-ratio"
    kinds = {*config.plan.units} - {*GATED_UNITS}
    rules = {
        **is_unset(
            config,
            "not be given (--search.tolerance or --search.macs says how far the search goes)",
        ),
        "search.mode": (
            (mode == "fixed") == fixed,
            "be fixed" if fixed else "be iterative, equal-macs or grid",
            mode,
        ),
        "search.rescore": (
            fixed or not config.search.rescore or not kinds or mode != "iterative",
            "be off where units are cut that cannot be scored behind masks (--search.no-rescore)",
            ", ".join(sorted(kinds)),
        ),
    }
    require(config.recipe, rules)


PRESETS = {
    "digits": {"search": {"tolerance": 0.03}},
    # so few images let through what all of them refuse
    "smoke": {"search": {"tolerance": 0.1, "images": 32}},
    # trained like CP-ViT, with which the paper compares: about 10,000 steps, 1,000 of warm-up
    "cifar": {
        "data": {"batch_size": 64},
        "search": {"tolerance": 0.005, "images": 5000},
        "distill": {
            "epochs": 14,
            "optimizer": "sgd",
            "lr": 3e-2,
            "lr_batch": None,
            "weight_decay": 0.0,
            "warmup_epochs": 1.4,
        },
    },
    "tiny-imagenet": {"search": {"tolerance": 0.01, "images": 5000}},
    "mini-imagenet": {"search": {"tolerance": 0.01, "images": 5000}},
    "imagenet": {"search": {"tolerance": 0.01, "images": 5000}},
}

RECIPE = Recipe("auto-ratio", steps, {"sweep": {"compensate": False}}, PRESETS)
