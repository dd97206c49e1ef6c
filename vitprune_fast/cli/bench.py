"""`vitprune-fast bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_model
from vitprune_fast.recipes.config import ModelConfig


@dataclass(frozen=True)
class Bench:
    """Measure a model: parameters, MACs, latency and images per second."""

    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    batch_sizes: tuple[int, ...] = (1, 64)
    """Batch sizes to time."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """Torch threads on the CPU; unset: one per available core."""


def main(words: list[str]) -> int:
    """Times the model and prints a table."""
    options = parse("bench", words, lambda chosen: Bench())
    if options is None:
        return 0
    import vitprune_fast as vp
    from vitprune_fast.cli.display import print_table
    from vitprune_fast.recipes import models, stages
    from vitprune_fast.recipes.profile import applied, choose_profile

    profile = choose_profile(options.device, options.threads)
    print(f"profile {profile}")
    model = models.open_model(options.model)
    cost = vp.cost(model)
    print(f"{cost.params:,} params, {cost.macs:,} MACs")
    with applied(profile):
        rows = [
            (
                str(result.batch_size),
                f"{result.median_s * 1e3:.2f}",
                f"{result.p90_s * 1e3:.2f}",
                f"{result.images_per_s:,.0f}",
            )
            for result in stages.measure(model, profile.device, options.batch_sizes)
        ]
    print_table(("batch", "median ms", "p90 ms", "images/s"), rows)
    return 0
