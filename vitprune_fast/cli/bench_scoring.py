"""`vitprune-fast bench scoring`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vitprune_fast.cli.options import parse
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import Computed


@dataclass(frozen=True)
class BenchScoring:
    """Race our scoring against the alternatives, on random images.

    On a CPU the processor time of one thread counts, on a GPU the time on its stream.
    """

    model: Annotated[ModelConfig, arg(name="")] = field(
        default_factory=lambda: ModelConfig(name="deit_tiny_patch16_224")
    )
    batch_size: Annotated[int, arg(metavar="N")] = 8
    """Images of the batch that is scored."""
    rounds: Annotated[int, arg(metavar="N")] = 10
    """How often every form is timed, in turns."""
    dtype: Computed = "auto"
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write what was found here, as the files of bench/results in the repository are."""


def main(words: list[str]) -> None:
    """Runs the race and prints a table."""
    options = parse(
        "bench scoring", words, lambda chosen: BenchScoring(), outputs=lambda own: {"out": own.out}
    )
    import torch

    from vitprune_fast.batches import classes_of
    from vitprune_fast.benches.results import Results, step_race
    from vitprune_fast.benches.scoring import race
    from vitprune_fast.cli.display import print_table
    from vitprune_fast.errors import InvalidInput, NotEnoughMemory
    from vitprune_fast.models.open import open_model
    from vitprune_fast.randomness import generator
    from vitprune_fast.run.profile import choose_profile
    from vitprune_fast.scoring.stream import is_out_of_memory
    from vitprune_fast.structure import describe

    if options.batch_size < 1:
        raise InvalidInput(f"bench: batch_size must be at least 1, got {options.batch_size}")
    profile = choose_profile(options.device, 1, dtype=options.dtype)
    device, dtype = profile.device, getattr(torch, profile.dtype)
    model: Any = open_model(options.model).to(device, dtype)
    random = generator(0, "bench")
    size = (options.batch_size, *describe(model).input_size)
    print(f"{options.model.name}, batch {options.batch_size}, {dtype}, {device}")
    try:
        images = torch.randn(size, generator=random).to(device, dtype)
        labels = torch.randint(classes_of(model), size[:1], generator=random).to(device)
        entries = race(model, images, labels, rounds=options.rounds)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemory(
            f"bench: batch_size must be one that fits into memory, got {options.batch_size}"
        ) from None
    case = f"{options.model.name}, batch {options.batch_size}, {profile.dtype}"
    command = shlex.join(["vitprune-fast", "bench", "scoring", *words])
    Results(options.out, command).add("scoring", step_race(case, device, entries))
    print_table(
        ("form", "ms", "spread", "images/s", "times ours", "of limit"),
        [
            (
                f"{entry.name} ({entry.note})" if entry.note else entry.name,
                f"{entry.seconds * 1e3:,.1f}",
                f"{entry.spread:.0%}",
                f"{entry.images_per_s:,.1f}",
                f"{entry.times_ours:.2f}",
                "" if entry.of_limit is None else f"{entry.of_limit:.0%}",
            )
            for entry in entries
        ],
    )
    print(
        "of limit: the matrix products of forward and input gradients at the rate of the best "
        "product measured here, over the time"
    )
