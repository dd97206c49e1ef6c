"""`vitprune-fast bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated

from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_model
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import Computed, Threads


@dataclass(frozen=True)
class Bench:
    """Measure a model, alone or against another: parameters, MACs, latency, images per second.

    `vitprune-fast bench kernels` races the ops instead, `vitprune-fast bench scoring` the scoring,
    and `vitprune-fast bench data` measures how fast photographs are read.
    """

    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    against: Annotated[str | None, arg(metavar="DIR|NAME")] = None
    """A second model (a saved folder, or a name of timm), measured in turns with the first."""
    batch_sizes: tuple[int, ...] = (1, 64)
    """Batch sizes to time."""
    seconds: Annotated[float, arg(metavar="SECONDS")] = 1.0
    """How long each batch size is measured."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    dtype: Computed = "auto"
    threads: Threads = None


def main(words: list[str]) -> None:
    """Times the model and prints a table."""
    if words and words[0] in ("kernels", "scoring", "data"):
        return import_module(f"vitprune_fast.cli.bench_{words[0]}").main(words[1:])
    options = parse("bench", words, lambda chosen: Bench())
    import vitprune_fast as vp
    from vitprune_fast.cli.display import print_assumptions, print_table
    from vitprune_fast.models.open import open_model
    from vitprune_fast.planning.waiting import load_warning
    from vitprune_fast.run import actions
    from vitprune_fast.run.profile import applied, choose_profile

    profile = choose_profile(options.device, options.threads, dtype=options.dtype)
    print(f"profile {profile}")
    configs = [options.model, *([ModelConfig(name=options.against)] if options.against else [])]
    opened = [open_model(config) for config in configs]
    for number, (config, model) in enumerate(zip(configs, opened, strict=True), 1):
        cost = vp.cost(model)
        print(f"model {number}: {config.name}, {cost.params:,} params, {cost.macs:,} MACs")
    with applied(profile):
        measured = actions.measure(
            opened,
            profile.device,
            options.batch_sizes,
            seconds=options.seconds,
            dtype=profile.dtype,
        )
    rows = [
        (
            str(number),
            str(result.batch_size),
            f"{result.median_s * 1e3:.2f}",
            f"{result.p90_s * 1e3:.2f}",
            f"{result.images_per_s:,.0f}",
        )
        for number, results in enumerate(measured, 1)
        for result in results
    ]
    print_table(("model", "batch", "median ms", "p90 ms", "images/s"), rows)
    warning = load_warning(*(result.waited for results in measured for result in results))
    print_assumptions({"latency": warning} if warning else {})
