"""`vitprune-fast export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from vitprune_fast import registry
from vitprune_fast.cli.options import parse, required_model
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import Threads


@dataclass(frozen=True)
class Export:
    """Write a model for others: read back, and compared with the model before it is kept."""

    to: Annotated[
        str, arg(metavar="FORMAT", help=f"What to write: {registry.described('export')}")
    ] = tyro.MISSING
    out: Annotated[Path, arg(metavar="PATH")] = tyro.MISSING
    """The file, or for `hf` and `timm` the folder, that is written."""
    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    seed: Annotated[int, arg(metavar="N")] = 0
    """Draws weights that come from nowhere else."""
    threads: Threads = None


def main(words: list[str]) -> None:
    """Exports the model and prints how far what was written is from it."""
    options = parse("export", words, lambda chosen: Export(), outputs=lambda o: {"out": o.out})
    import vitprune_fast as vp
    from vitprune_fast.cli.display import print_assumptions
    from vitprune_fast.run.assumptions import about_weights
    from vitprune_fast.run.inputs import open_weights
    from vitprune_fast.run.profile import applied, choose_profile

    with applied(choose_profile("cpu", options.threads)):
        model = open_weights(options.model, options.seed)
        print_assumptions(about_weights(options.model, options.seed, model))
        made = vp.export(model, options.to, options.out)
    print(
        f"{made.path}: read back, logits at batch sizes "
        f"{' and '.join(map(str, made.batch_sizes))} differ by at most {made.gap:.2g} "
        f"(allowed {made.tolerance:.2g})"
    )
