"""`vitprune-fast plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_model
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import PlanConfig, Threads


@dataclass(frozen=True)
class Plan:
    """Choose which units stay, so that the model meets a budget."""

    scores: Annotated[Path, arg(metavar="FILE")] = tyro.MISSING
    """Scores written by `vitprune-fast score`."""
    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    out: Annotated[Path, arg(metavar="FILE")] = Path("plan.json")
    """Where the plan goes (JSON)."""
    plan: Annotated[PlanConfig, arg(name="")] = field(default_factory=PlanConfig)
    threads: Threads = None


def main(words: list[str]) -> None:
    """Plans within the budget and saves the plan."""
    options = parse("plan", words, lambda chosen: Plan(), outputs=lambda plan: {"out": plan.out})
    import vitprune_fast as vp
    from vitprune_fast.cli.display import print_assumptions
    from vitprune_fast.models.open import skeleton
    from vitprune_fast.planning.cost import predict_cost
    from vitprune_fast.run import actions
    from vitprune_fast.run.assumptions import about_budget, about_scores
    from vitprune_fast.run.profile import applied, choose_profile

    scores = vp.Scores.load(options.scores)
    with applied(choose_profile("cpu", options.threads)):
        model = skeleton(options.model)
        plan = actions.plan(model, scores, options.plan)
        print_assumptions({**about_scores(scores), **about_budget(options.plan)})
        plan.save(options.out)
        structure = vp.describe(model)
        before, after = vp.cost(model), predict_cost(structure, plan)
    print(
        f"{options.out}: {after.macs:,} of {before.macs:,} MACs, "
        f"{after.params:,} of {before.params:,} params"
    )
