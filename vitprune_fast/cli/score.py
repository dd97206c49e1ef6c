"""`vitprune-fast score`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_data, required_model
from vitprune_fast.recipes.config import DataConfig, ModelConfig, ScoreConfig


@dataclass(frozen=True)
class Score:
    """Measure how much every head and neuron matters, on the training split."""

    out: Annotated[Path, arg(metavar="FILE")] = Path("scores.safetensors")
    """Where the scores go (safetensors, one vector per axis)."""
    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    data: Annotated[DataConfig, arg(name="")] = field(default_factory=required_data)
    score: Annotated[ScoreConfig, arg(name="")] = field(default_factory=ScoreConfig)
    seed: Annotated[int, arg(metavar="N")] = 0
    """Chooses which training images are scored."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""


def main(words: list[str]) -> int:
    """Scores the model and saves the scores."""
    options = parse("score", words, lambda chosen: Score())
    if options is None:
        return 0
    from vitprune_fast.recipes import stages
    from vitprune_fast.recipes.opened import open_both

    model, data, setting = open_both(options.model, options.data, options.seed, options.device)
    scores = stages.score(model, data, options.score, setting)
    scores.save(options.out)
    print(f"{options.out}: {len(scores)} axes, {scores.samples:,} images, {scores.criterion}")
    return 0
