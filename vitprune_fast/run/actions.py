"""What steps of a run and verbs of the command line both do, as functions of plain values.

Which split they may read is fixed here: training, scoring and the sweep read `train`, the choice
of a checkpoint and the search read `validation`, and the evaluations alone read `test`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast import evaluation, planning, scoring, surgery
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.run import (
    ConstraintConfig,
    DataConfig,
    PlanConfig,
    ScoreConfig,
    SweepConfig,
    part_way,
)
from vitprune_fast.config.search import SearchConfig
from vitprune_fast.data import Augment, ImageData, Images, Loader, RandomCrop
from vitprune_fast.distill.loop import distill
from vitprune_fast.distill.teachers import Teacher
from vitprune_fast.errors import InvalidInput
from vitprune_fast.planning.latency import latencies
from vitprune_fast.precision import Precision, is_half, resolve
from vitprune_fast.randomness import derive_seed, generator
from vitprune_fast.ranks import Ranks
from vitprune_fast.run.profile import Profile
from vitprune_fast.search import SearchResult
from vitprune_fast.search import search as search_ratios
from vitprune_fast.structure import describe

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Setting:
    """What every action needs besides its inputs."""

    seed: int
    profile: Profile
    images: DataConfig


def train(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    data: ImageData,
    config: DistillConfig,
    setting: Setting,
    *,
    purpose: str,
    gates: Any = None,
    gate_budget: Any = None,
    masks: Any = None,
    checkpoint_dir: Any = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
) -> Any:
    """Trains `student` on the training split, with the help of `teacher` if there is one.

    Args:
        student: trained in place, on the setting's device.
        teacher: one, or several; None trains on the labels alone. A plain module answers in the
            dtype of the training where that has 16 bits.
        data: `train` is learned from; `validation` is only measured, or chooses the checkpoint.
        config: schedule and losses; where its dtype is auto, it is the setting's.
        setting: seed, device, dtype, loader processes, batch size, augmentation.
        purpose: keeps the randomness of two trainings with one seed apart.
        gates: attached to the student; they learn too.
        gate_budget: holds the gates' multiply-accumulates down.
        masks: when units go and come back while training.
        checkpoint_dir: where to checkpoint, and to resume from; None keeps nothing.
        on_event: called with steps and epochs.
        stop: asked after every step; True ends the training with a checkpoint.

    Returns:
        The `DistillResult` of the training loop.
    """
    seed = derive_seed(setting.seed, purpose)
    train_loader = Loader(
        data.split("train"),
        setting.images.batch_size,
        shuffle=True,
        augment=_augmentation(data, setting.images),
        seed=seed,
        workers=setting.profile.workers,
        repeats=setting.images.repeats,
        processes=Ranks.current().world,
    )
    validation = _fixed(data.split("validation"), setting)
    dtype = setting.profile.dtype if config.dtype == "auto" else config.dtype
    half = resolve("distill", dtype, setting.profile.device)
    several = [teacher] if isinstance(teacher, nn.Module) else teacher
    with closing(train_loader), closing(validation):
        return distill(
            student.to(setting.profile.device),
            several
            and [_answering(each.to(setting.profile.device).eval(), half) for each in several],
            train_loader,
            validation,
            replace(config, seed=seed, dtype=dtype),
            gates=gates,
            gate_budget=gate_budget,
            masks=masks,
            checkpoint_dir=checkpoint_dir,
            on_event=on_event,
            stop=stop,
        )


def _fixed(
    images: Images, setting: Setting, batch_size: int | None = None, *, keep: bool = True
) -> Loader:
    """Images as they are, in their order; kept where they are looked at again."""
    size = batch_size or setting.images.batch_size
    return Loader(images, size, workers=setting.profile.workers, keep=keep)


def _answering(teacher: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A teacher that answers in 16 bits if the student does, unless it has a dtype of its own."""
    if isinstance(teacher, Teacher) or not is_half(dtype):
        return teacher
    return Teacher(teacher, dtype=dtype)


def _augmentation(data: ImageData, config: DataConfig) -> Augment | None:
    """How training changes images of this data."""
    if not config.augment:
        return None
    crop = RandomCrop(
        scale=config.crop_scale,
        policy=config.policy,
        jitter=config.color_jitter,
        simple=config.crop == "simple",
    )
    if crop == RandomCrop():
        return data.augmentation
    if not isinstance(data.augmentation, RandomCrop):
        raise InvalidInput(
            "distill: policy, crop, crop_scale and color_jitter must be unset for "
            f"{data.name}, which are no photographs, got {crop}"
        )
    return crop


def score(
    model: nn.Module,
    data: ImageData,
    config: ScoreConfig,
    setting: Setting,
    *,
    checkpoint: Path | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
) -> Any:
    """`Scores` of the model on the first `config.samples` of a seeded order of the train split.

    Args:
        model: is moved to the setting's device.
        data: its `train` split is read.
        config: criterion, units, how many images.
        setting: seed, device, dtype, loader processes.
        checkpoint: where the sums are kept; a stopped scoring goes on from there.
        on_event: called with the number of images that are done.
        stop: asked after every step; True ends the scoring with a checkpoint.

    Raises:
        ScoringStopped: `stop` said so.
    """
    images = scored_images(data, config, setting.seed)
    with closing(_fixed(images, setting, config.batch_size)) as loader:
        return scoring.score(
            model.to(setting.profile.device),
            loader,
            criterion=config.criterion,
            units=config.units or ("head", "neuron"),
            reduction=config.reduction,
            loss=None if config.loss == "ce" else config.loss,
            objective=config.objective,
            seed=derive_seed(setting.seed, "score labels"),
            draws=config.draws,
            candidates=config.candidates,
            loss_scale=config.loss_scale,
            cuda_graph="auto" if config.cuda_graph == "auto" else config.cuda_graph == "always",
            dtype=setting.profile.dtype,
            checkpoint=checkpoint,
            on_event=on_event and (lambda event: on_event({**event, "steps": len(images)})),
            stop=stop,
        )


def scored_images(data: ImageData, config: ScoreConfig, seed: int) -> Images:
    """The training images that are scored on, in the order of the stream."""
    train, own = data.split("train"), derive_seed(seed, "score")
    order = torch.randperm(len(train), generator=generator(own, "order", 0))
    return train.some(order[: config.samples])


def plan(
    model: nn.Module, scores: Any, config: PlanConfig, *, dense: planning.Cost | None = None
) -> Any:
    """The `Plan` that meets the configured budget; shares of a cost are those of `dense`."""
    budget: dict[str, Any] = config.budget()
    if dense is not None or config.toward < 1:
        budget |= limits(config, dense or planning.cost(model))
    return planning.plan(
        model,
        scores,
        planning.Budget(**budget),
        units=config.units,
        **config.choice(),
    )


def search(
    model: nn.Module,
    scores: Any,
    data: ImageData,
    scoring_config: ScoreConfig,
    config: SearchConfig,
    constraints: ConstraintConfig,
    setting: Setting,
    *,
    units: Sequence[str] | None = None,
    checkpoint: Path | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
) -> SearchResult:
    """The ratios that are found on the validation split, which is read in a seeded order.

    Args:
        model: is moved to the setting's device.
        scores: of the model.
        data: `validation` is evaluated on; `train` is read to score again.
        scoring_config: how it is scored again.
        config: the mode and its settings.
        constraints: what candidates take.
        setting: seed, device, dtype, loader processes, batch size.
        units: the kinds that are searched; None is all that have scores.
        checkpoint: where evaluated candidates are kept; a killed search goes on from there.
        on_event: called with every candidate.
        stop: asked after every candidate, and while it is scored again; True ends the search.

    Raises:
        SearchStopped: `stop` said so; or ScoringStopped.
    """
    axes, validation = describe(model).axes, data.split("validation")
    order = torch.randperm(len(validation), generator=generator(setting.seed, "search"))
    asked = {each.name: getattr(config, each.name) for each in fields(config)}
    rescored = asked.pop("rescore")

    def again(cut: nn.Module) -> Any:
        return score(cut, data, scoring_config, setting, stop=stop)

    with closing(_fixed(validation.some(order), setting)) as loader:
        return search_ratios(
            model.to(setting.profile.device),
            scores,
            loader,
            units=units or [*dict.fromkeys(axes[name].kind for name in scores)],
            scorer=again if rescored else None,
            dtype=setting.profile.dtype,
            plan_options=constraints.choice(),
            checkpoint=checkpoint,
            on_event=on_event,
            stop=stop,
            **asked,
        )


def limits(config: PlanConfig, dense: planning.Cost) -> dict[str, int]:
    """The configured budget as numbers of parameters and multiply-accumulates, where it is one.

    Args:
        config: says how much of the way to its budget is to be gone.
        dense: what shares are shares of.
    """
    found = planning.Budget(**config.budget()).limits(dense)
    if config.toward < 1:
        for name, limit in found.items():
            full = getattr(dense, name)
            found[name] = int(full * part_way(limit / full, config.toward, config.along))
    return found


def calibration(data: ImageData, config: SweepConfig, setting: Setting) -> Loader:
    """The training images that the sweep refits on, in a seeded order of its own, unchanged.

    Raises:
        InvalidInput: there are not two of them.
    """
    train = data.split("train")
    if len(train) < 2:
        raise InvalidInput(
            f"sweep: {data.name} must have at least 2 training images, got {len(train)}; add "
            "images, or refit nothing (--no-compensate)"
        )
    order = torch.randperm(len(train), generator=generator(setting.seed, "calibration"))
    return _fixed(train.some(order[: config.images]), setting)


def sweep(
    dense: nn.Module,
    plan: Any,
    data: ImageData,
    config: SweepConfig,
    setting: Setting,
    *,
    checkpoint: Path | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[nn.Module, Any]:
    """The pruned model, refitted on training images, and the `SweepReport`.

    Args:
        dense: goes to the setting's device, and is left as it is otherwise.
        plan: made for it.
        data: `train` is read, no label.
        config: how many images.
        setting: seed (which images), device, dtype, loader processes, batch size.
        checkpoint: where to keep what is done, and to resume from; None keeps nothing.
        on_event: called with every place that was fitted.
        stop: asked after each of them; True ends the sweep with a checkpoint.

    Raises:
        InvalidInput: too few images, or what `vp.prune` refuses.
        SweepStopped: as said.
    """
    with warnings.catch_warnings(), closing(calibration(data, config, setting)) as images:
        # they stand in the report as well, and are printed from there
        warnings.filterwarnings("ignore", "prune: ")
        model, report = surgery.prune(
            dense.to(setting.profile.device),
            plan,
            calibration=images,
            report=True,
            checkpoint=checkpoint,
            dtype=setting.profile.dtype,
            on_event=on_event,
            stop=stop,
        )
    return model, report


def probe_images(data: ImageData, count: int = 8) -> Tensor:
    """A few training images (count, C, H, W) on which a step checks its own result."""
    found: list[Tensor] = []
    for images, *_ in Loader(data.split("train"), count):
        found.append(images)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


def evaluate(
    models: Sequence[nn.Module], data: ImageData, setting: Setting, *, split: str = "test"
) -> list[Any]:
    """`Evaluation` of each model on a split that is read once; agreement is with the first.

    Processes share the split, and all call.
    """
    dense, *others = (model.to(setting.profile.device) for model in models)
    with closing(_fixed(data.split(split), setting, keep=False)) as loader:
        return evaluation.evaluate_beside(
            dense, others, loader, dtype=setting.profile.dtype, ranks=Ranks.current()
        )


def measure(
    models: Sequence[nn.Module],
    device: str,
    batch_sizes: tuple[int, ...] = (1, 64),
    *,
    seconds: float = 1.0,
    dtype: Precision = "auto",
) -> list[list[Any]]:
    """`Latency` of each model at each batch size, the models in turns, on `device` in `dtype`."""
    options: Any = {"device": device, "seconds": seconds, "dtype": dtype}
    by_size = [latencies(models, batch_size=size, **options) for size in batch_sizes]
    return [list(of_model) for of_model in zip(*by_size, strict=True)]


def synchronise(device: str) -> None:
    """Waits for the device, so that an error of a step is raised inside that step."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
