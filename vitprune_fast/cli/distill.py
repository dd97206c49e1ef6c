"""`vitprune-fast distill`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_data, required_model
from vitprune_fast.distill.config import DistillConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.config import (
    DataConfig,
    GateConfig,
    MaskConfig,
    ModelConfig,
    TeacherConfig,
)


@dataclass(frozen=True)
class Distill:
    """Teach a model with its dense teacher, a CNN or several, on the training split.

    The model is pruned already; with --gates or --mask-macs it is dense, and is pruned here.
    """

    teacher: Annotated[TeacherConfig, arg(name="")] = field(default_factory=TeacherConfig)
    out: Annotated[Path, arg(metavar="DIR")] = Path("distilled")
    """Folder for the taught model."""
    checkpoints: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where to checkpoint; the same command then resumes there."""
    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    data: Annotated[DataConfig, arg(name="")] = field(default_factory=required_data)
    gates: Annotated[GateConfig, arg(name="")] = field(default_factory=GateConfig)
    masks: Annotated[MaskConfig, arg(name="")] = field(default_factory=MaskConfig)
    schedule: Annotated[DistillConfig, arg(name="")] = field(default_factory=DistillConfig)
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    tensorboard: Annotated[Path | None, arg(metavar="DIR")] = None
    """Also write the curves for TensorBoard, a folder per training."""


def main(words: list[str]) -> int:
    """Distils the model and saves it."""
    options = parse("distill", words, lambda chosen: Distill())
    if options is None:
        return 0
    import vitprune_fast as vp
    from vitprune_fast.checkpoint import check_folder
    from vitprune_fast.cli.display import Display
    from vitprune_fast.recipes.board import Board
    from vitprune_fast.recipes.opened import open_both
    from vitprune_fast.recipes.teaching import teach

    if options.schedule.needs_teacher and not options.teacher.names:
        raise InvalidInput(
            "distill: teacher must be given, got none; --teacher self is the model as it is, and "
            "--alpha 0 learns from the labels alone"
        )
    check_folder(options.out)
    seed = options.schedule.seed
    model, data, setting = open_both(options.model, options.data, seed, options.device)
    with Display() as display:
        taught = teach(
            model,
            data,
            options.schedule,
            setting,
            teachers=options.teacher,
            gates=options.gates,
            masks=options.masks,
            checkpoints=options.checkpoints,
            on_event=display,
            board=options.tensorboard and Board(options.tensorboard),
        )
    vp.save(taught, options.out)
    print(options.out)
    return 0
