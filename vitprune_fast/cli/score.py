"""`vitprune-fast score`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vitprune_fast.cli.options import parse, partial_of, required_images, required_model
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import Computed, ScoreConfig, ShownConfig, Threads


@dataclass(frozen=True)
class Score:
    """Measure how much every unit of a model matters, on the training split.

    A stopped scoring goes on where it was: the same command takes its sums up again.
    """

    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    data: Annotated[ShownConfig, arg(name="")] = field(default_factory=required_images)
    out: Annotated[Path, arg(metavar="FILE")] = Path("scores.safetensors")
    """Where the scores go (safetensors, one vector per axis)."""
    score: Annotated[ScoreConfig, arg(name="")] = field(default_factory=ScoreConfig)
    seed: Annotated[int, arg(metavar="N")] = 0
    """Chooses which training images are scored."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    dtype: Computed = "auto"
    threads: Threads = None


def main(words: list[str]) -> None:
    """Scores the model and saves the scores."""
    options = parse("score", words, lambda chosen: Score(), outputs=_outputs)
    from vitprune_fast import files
    from vitprune_fast.cli.display import (
        Display,
        print_assumptions,
        print_set_aside,
        print_table,
        rate_text,
    )
    from vitprune_fast.cli.signals import stoppable
    from vitprune_fast.errors import InvalidInput
    from vitprune_fast.run import actions
    from vitprune_fast.run.inputs import open_both
    from vitprune_fast.run.profile import applied
    from vitprune_fast.scoring import ScoringStopped
    from vitprune_fast.scoring.agreement import agreement_text
    from vitprune_fast.stated import caveats

    # found out before the work whose result goes there
    files.probe_folder(options.out.parent)
    if options.out.is_dir():
        raise InvalidInput(f"score: out must be a file, got the folder {options.out}")
    opened = open_both(
        options.model,
        options.data,
        options.seed,
        options.device,
        options.threads,
        options.dtype,
        labels=options.score.objective == "logits",
    )
    model = opened.model
    print_assumptions(opened.assumptions)
    with (
        applied(opened.setting.profile),
        Display() as display,
        stoppable(display, ScoringStopped, stage="score") as (on_event, stop),
    ):
        started = time.perf_counter()
        scores = actions.score(
            model,
            opened.data,
            options.score,
            opened.setting,
            checkpoint=partial_of(options.out),
            on_event=on_event,
            stop=stop,
        )
        seconds = time.perf_counter() - started
    files.make_folder(options.out.parent)
    if caveats(model).get("weights") == "random":
        scores = replace(scores, provenance={**scores.provenance, "weights": "random"})
    scores.save(options.out)
    print_set_aside(opened.data)
    rate = f", {rate_text(scores.samples / seconds)}" if scores.samples else ""
    aside = f", {scores.skipped:,} set aside" if scores.skipped else ""
    print(
        f"{options.out}: {len(scores)} axes, {scores.samples:,} images{rate}{aside}, "
        f"{scores.criterion} {scores.reduction}"
    )
    if agreement := agreement_text(scores.provenance):
        print(agreement)
    print_table(("unit kind", "axes", "units", "least", "median", "most"), _summary(model, scores))


def _outputs(options: Score) -> dict[str, Path | None]:
    return {"out": options.out, "the partial sums of out": partial_of(options.out)}


def _summary(model: Any, scores: Any) -> list[tuple[str, ...]]:
    """A line per unit kind: how many, and how their scores lie."""
    import torch

    import vitprune_fast as vp

    axes = vp.describe(model).axes
    rows = []
    for kind in dict.fromkeys(axes[name].kind for name in scores):
        values = [scores.ranking(name) for name in scores if axes[name].kind == kind]
        together = torch.cat(values)
        spread = (together.min(), together.median(), together.max())
        counts = (str(len(values)), f"{len(together):,}")
        rows.append((kind, *counts, *(f"{value.item():.3g}" for value in spread)))
    return rows
