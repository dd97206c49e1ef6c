"""`vitprune-fast prune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_model
from vitprune_fast.recipes.config import ModelConfig, Threads


@dataclass(frozen=True)
class Prune:
    """Cut a plan out of a model: a smaller dense model, checked against the masked one."""

    plan: Annotated[Path, arg(metavar="FILE")] = tyro.MISSING
    """Plan written by `vitprune-fast plan`."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("pruned")
    """Folder for the pruned model."""
    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    seed: Annotated[int, arg(metavar="N")] = 0
    """Draws weights that come from nowhere else, as `score` does."""
    threads: Threads = None


def main(words: list[str]) -> int:
    """Prunes, proves the result on random images, and saves it."""
    options = parse("prune", words, lambda chosen: Prune(), outputs=lambda cut: {"out": cut.out})
    if options is None:
        return 0
    import vitprune_fast as vp
    from vitprune_fast.checkpoint import check_folder
    from vitprune_fast.cli.display import print_assumptions
    from vitprune_fast.recipes import checks
    from vitprune_fast.recipes.assumptions import about_weights
    from vitprune_fast.recipes.opened import open_weights
    from vitprune_fast.recipes.profile import applied, choose_profile

    check_folder(options.out)
    with applied(choose_profile("cpu", options.threads)):
        model = open_weights(options.model, options.seed)
        plan = vp.Plan.load(options.plan)
        print_assumptions(about_weights(options.model, options.seed, model))
        pruned, proofs = checks.prune_and_prove(model, plan, checks.random_images(model))
        checks.require("prune", proofs)
        vp.save(pruned, options.out)
        before, after = vp.cost(model), vp.cost(pruned)
    print(
        f"{options.out}: {after.macs:,} of {before.macs:,} MACs, "
        f"{after.params:,} of {before.params:,} params; checked: "
        + "; ".join(proof.name for proof in proofs)
    )
    return 0
