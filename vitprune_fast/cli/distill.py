"""`vitprune-fast distill`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_data, required_model
from vitprune_fast.distill.config import DistillConfig
from vitprune_fast.recipes.config import DataConfig, ModelConfig


@dataclass(frozen=True)
class Distill:
    """Teach a pruned model with its dense teacher, on the training split."""

    teacher: Annotated[str, arg(metavar="DIR|NAME")] = tyro.MISSING
    """The dense model: a saved folder, or a model of timm with its pretrained weights."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("distilled")
    """Folder for the taught model."""
    checkpoints: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where to checkpoint; the same command then resumes there."""
    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    data: Annotated[DataConfig, arg(name="")] = field(default_factory=required_data)
    schedule: Annotated[DistillConfig, arg(name="")] = field(default_factory=DistillConfig)
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""


def main(words: list[str]) -> int:
    """Distils the model and saves it."""
    options = parse("distill", words, lambda chosen: Distill())
    if options is None:
        return 0
    import vitprune_fast as vp
    from vitprune_fast.checkpoint import check_folder
    from vitprune_fast.cli.display import Display
    from vitprune_fast.recipes import models, stages
    from vitprune_fast.recipes.opened import check_fit, open_both

    check_folder(options.out)
    seed = options.schedule.seed
    model, data, setting = open_both(options.model, options.data, seed, options.device)
    in_timm = not Path(options.teacher).is_dir()
    teacher = models.open_model(ModelConfig(name=options.teacher, pretrained=in_timm))
    check_fit(teacher, data)
    with Display() as display:
        result = stages.train(
            model,
            teacher,
            data,
            options.schedule,
            setting,
            purpose="distill",
            checkpoint_dir=options.checkpoints,
            on_event=display,
        )
    vp.save(result.model, options.out)
    print(options.out)
    return 0
