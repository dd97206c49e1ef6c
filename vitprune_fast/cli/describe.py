"""`vitprune-fast describe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_model
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import Threads


@dataclass(frozen=True)
class Describe:
    """List the axes of a model: what can be removed, how many units, and the model's cost."""

    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    threads: Threads = None


def main(words: list[str]) -> None:
    """Prints one line per axis and the cost."""
    options = parse("describe", words, lambda chosen: Describe())
    import vitprune_fast as vp
    from vitprune_fast.cli.display import print_table
    from vitprune_fast.models.open import skeleton
    from vitprune_fast.run.profile import applied, choose_profile

    with applied(choose_profile("cpu", options.threads)):
        model = skeleton(options.model)
        structure, cost = vp.describe(model), vp.cost(model)
    rows = [(name, axis.kind, f"{axis.size:,}") for name, axis in structure.axes.items()]
    print_table(("axis", "unit", "size"), rows)
    print(f"{cost.params:,} params, {cost.macs:,} MACs")
