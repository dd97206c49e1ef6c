"""`vitprune-fast distill`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_data, required_model
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import DataConfig, GateConfig, MaskConfig, TeacherConfig, Threads
from vitprune_fast.errors import InvalidInput


@dataclass(frozen=True)
class Distill:
    """Teach a model with its dense teacher, a CNN or several, on the training split.

    The model is pruned already; with --gates or --mask-macs it is dense, and is pruned here. What
    is stopped goes on where it was: the same command takes it up again.
    """

    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    data: Annotated[DataConfig, arg(name="")] = field(default_factory=required_data)
    teacher: Annotated[TeacherConfig, arg(name="")] = field(default_factory=TeacherConfig)
    out: Annotated[Path, arg(metavar="DIR")] = Path("distilled")
    """Folder for the taught model."""
    checkpoints: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where to checkpoint, and to go on from; they stay there. Unset: beside --out, until the model
    is saved."""
    gates: Annotated[GateConfig, arg(name="")] = field(default_factory=GateConfig)
    masks: Annotated[MaskConfig, arg(name="")] = field(default_factory=MaskConfig)
    schedule: Annotated[DistillConfig, arg(name="")] = field(default_factory=DistillConfig)
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    threads: Threads = None


def main(words: list[str]) -> None:
    """Distils the model and saves it."""
    options = parse("distill", words, lambda chosen: Distill(), outputs=_outputs)
    import vitprune_fast as vp
    from vitprune_fast.cli.display import Display, print_assumptions, print_set_aside
    from vitprune_fast.cli.signals import stoppable
    from vitprune_fast.files import probe_folder
    from vitprune_fast.run import actions
    from vitprune_fast.run.assumptions import about_share
    from vitprune_fast.run.inputs import open_both, remember_normalisation
    from vitprune_fast.run.profile import applied
    from vitprune_fast.run.step import RunStopped
    from vitprune_fast.run.training import Trainings, teach
    from vitprune_fast.saved_models import check_folder, check_savable

    if options.schedule.needs_teacher and not options.teacher.names:
        raise InvalidInput(
            "distill: teacher must be given, got none; --teacher self is the model as it is, and "
            "--alpha 0 learns from the labels alone"
        )
    check_folder(options.out)
    checkpoints = options.checkpoints or beside(options.out)
    probe_folder(checkpoints)
    seed = options.schedule.seed
    dtype = options.schedule.dtype
    opened = open_both(options.model, options.data, seed, options.device, options.threads, dtype)
    check_savable(opened.model)
    print_assumptions({**opened.assumptions, **about_share(options.gates, options.masks)})
    with (
        applied(opened.setting.profile),
        Display() as display,
        stoppable(display, RunStopped) as (on_event, stop),
    ):
        trainings = Trainings(opened.data, opened.setting, checkpoints, on_event, stop)
        taught = teach(
            opened.model,
            options.schedule,
            trainings,
            teachers=options.teacher,
            gates=options.gates,
            masks=options.masks,
        )
        (found,) = actions.evaluate([taught], opened.data, opened.setting, split="validation")
    remember_normalisation(taught, opened.data, trained=True)
    vp.save(taught, options.out)
    if options.checkpoints is None:
        shutil.rmtree(checkpoints)
    print_set_aside(opened.data)
    shown = f"{found.top1:.2%} ({found.top1_count:,} of {found.samples:,})"
    print(f"{options.out}: validation top-1 {shown}")


def beside(out: Path) -> Path:
    """Where an unfinished training of a model to be saved there is kept."""
    return out.parent / f"{out.name}.partial"


def _outputs(options: Distill) -> dict[str, Path | None]:
    return {"out": options.out, "checkpoints": options.checkpoints or beside(options.out)}
