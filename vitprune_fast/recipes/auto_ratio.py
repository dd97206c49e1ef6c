"""Separate ratios for heads and neurons, found by evaluation on validation images.

data  dense  [teacher]  score  search  prune  [sweep]  distill  evaluate  report

After Feng et al., "Automatic hyper-parameter search for Vision Transformer pruning" (PRAI 2023), of
which only the abstract is public: `docs/recipes/auto-ratio.md`. With `fixed-ratio` it shares all
but the settings.
"""

from __future__ import annotations

from vitprune_fast.config.run import BudgetConfig, RunConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.standard import judged, opened, scored, smaller, taught
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
    """Refuses other ways to say what goes."""
    plan, unset = config.plan, BudgetConfig()
    given = {
        **{name: getattr(plan, name) != getattr(unset, name) for name in vars(unset)},
        "gates": config.gates.kind != "none",
        "mask-macs": config.masks.macs is not None,
        "rounds": config.rounds.count > 1,
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise InvalidInput(
            f"run: {name} must not be given with the recipe {config.recipe}, which searches for "
            "what goes; --search.tolerance or --search.macs says how far"
        )


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
    "imagenet": {"search": {"tolerance": 0.01, "images": 5000}},
}

RECIPE = Recipe("auto-ratio", steps, {"sweep": {"compensate": False}}, PRESETS)
