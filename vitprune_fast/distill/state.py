"""The state of a training: all that its steps change, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast.batches import Targets
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.distill.average import Average, EpochAverage
from vitprune_fast.distill.masks import MaskedStudent, MaskSchedule
from vitprune_fast.distill.objective import Objective, images_like
from vitprune_fast.distill.optim import is_fused, make_optimizer
from vitprune_fast.distill.progress import Event, Progress
from vitprune_fast.distill.rate import LARGEST, gate_rate
from vitprune_fast.distill.stream import Stream
from vitprune_fast.distill.tally import Tally
from vitprune_fast.distill.task import DistillTask
from vitprune_fast.distill.teachers import TeacherSet
from vitprune_fast.distill.training_checkpoints import (
    Checkpoint,
    read_newest,
    tidy,
    write_checkpoint,
)
from vitprune_fast.errors import InvalidInput, RunFolderError
from vitprune_fast.gates import BudgetLoss, Gates, kinds
from vitprune_fast.planning import Plan
from vitprune_fast.ranks import Ranks
from vitprune_fast.target_loss import TargetLoss

# (images, labels, ...), or images alone where no labels are learnt
Batches = Iterable[Any]


@dataclass(frozen=True)
class Learnt:
    """What is learnt beside teachers.

    Attributes:
        loss: of labels or other targets; None learns from teachers alone, and reads no labels.
        by_loss: validation measures the loss, because top-1 says nothing.
    """

    loss: TargetLoss | None
    by_loss: bool

    @property
    def own(self) -> TargetLoss | None:
        """The loss that was given in place of that of the config."""
        return self.loss if self.by_loss else None

    @property
    def targets(self) -> Targets:
        """What is read of a batch."""
        if self.loss is None:
            return "none"
        return self.loss.targets if self.by_loss else "labels"


class TrainingState:
    """One training: what it was given, and all that its steps change.

    Args:
        student: is trained in place.
        teachers: None learns from labels alone.
        train: batches with a length.
        val: batches that epochs are judged on, or None.
        config: the settings, with a resolved dtype.
        learnt: beside what teachers say.
        gates: attached to the student, or None.
        gate_budget: of the gates, or None.
        masks: how the live part shrinks, or None.

    Attributes:
        folder: where checkpoints are; None writes none.
        on_event: called with every event.
        named: the student's parameters that learn.
        best: weights of the best epoch so far; empty where none is kept.
        progress: its counters.

    Randomness needs no place here: every step sets its generators from the seed and its number.

    Raises:
        InvalidInput: as :func:`vitprune_fast.distill.distill` says of these arguments.
    """

    folder: Path | None
    on_event: Callable[[Event], None] | None

    def __init__(
        self,
        student: nn.Module,
        teachers: TeacherSet | None,
        train: Batches,
        val: Batches | None,
        config: DistillConfig,
        learnt: Learnt,
        gates: Gates | None,
        gate_budget: BudgetLoss | None,
        masks: MaskSchedule | None,
    ) -> None:
        self.student, self.teachers = student, teachers
        self.val, self.config, self.learnt = val, config, learnt
        self.gates = gates
        self.progress = Progress()
        self.ranks = Ranks.current()
        self.stream = Stream(train, student, config, self.ranks, learnt.targets)
        self.stream.check_alike()
        self.named = {n: p for n, p in student.named_parameters() if p.requires_grad}
        _check_parameters(self.named, alone=gates is None)
        compares_insides = teachers is not None and config.looks_inside
        pictures = images_like(student) if compares_insides else torch.empty(0)
        objective = Objective(
            config, student, teachers, pictures, learnt.loss is not None, learnt.own
        )
        self.task = DistillTask(student, objective, config, gates, gate_budget)
        self.optimizer = make_optimizer(student, self.named, self._other_groups(), config)
        kind = Average if config.ema_every == "step" else EpochAverage
        self.average = kind(student, config.ema, use_warmup=True) if config.ema else None
        self.tally = Tally()
        scales = config.dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.task.device.type, enabled=scales)
        half = torch.bfloat16 if config.dtype == "bfloat16" else None
        self.masked = MaskedStudent(student, masks, half) if masks else None
        self.best: dict[str, Tensor] = {}

    @cached_property
    def teacher_weights(self) -> dict[str, str]:
        """Teacher -> fingerprint of its weights."""
        return {teacher.name: teacher.fingerprint() for teacher in self.teachers or ()}

    @property
    def peak(self) -> float:
        """The peak learning rate: given, or found before the first step."""
        if self.config.lr is None:
            return self.progress.start.get("peak_lr", LARGEST)
        grown = self.stream.images_per_step / self.config.lr_batch if self.config.lr_batch else 1.0
        return self.config.lr * grown

    def _other_groups(self) -> list[dict[str, Any]]:
        """Parameters trained besides the student's, with their own learning rates."""
        config, groups = self.config, []
        if self.gates is not None:
            least = gate_rate(kinds.WAY[self.gates.kind], self.stream.steps)
            rate = config.gate_lr or max(5 * self.peak, least)
            least = gate_rate(kinds.WAY_OF_THRESHOLD, self.stream.steps)
            of_thresholds = config.gate_threshold_lr or max(rate, least)
            groups += self.gates.parameter_groups(lr=rate, threshold_lr=of_thresholds)
        if "gate_budget" in self.task.extras:
            budget: Any = self.task.extras["gate_budget"]
            least = gate_rate(kinds.WAY_OF_MULTIPLIER, self.stream.steps)
            groups += budget.parameter_groups(lr=config.gate_budget_lr or max(0.1, least))
        for group in groups:
            group["lr_scale"] = group.pop("lr") / self.peak
        projectors = list(self.task.objective.projectors.parameters())
        matrices = {"params": projectors, "lr_scale": 1.0, "weight_decay": config.weight_decay}
        return [*groups, matrices]

    def tell(self, event: str, epoch: int, **values: Any) -> None:
        """Send an event, with the epoch and the step."""
        if self.on_event is not None:
            place = {"epoch": epoch, "step": self.progress.step}
            self.on_event({"stage": "distill", "event": event, **place, **values})

    def save(self, epoch: int) -> None:
        """Write a checkpoint, where the training has a folder; one process does, for all."""
        if self.folder is not None:
            self.ranks.first_does("distill", partial(self._save, self.folder, epoch))

    def _save(self, folder: Path, epoch: int) -> None:
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for part, module in self._modules().items():
            tensors |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
        for name, parameter in self._learning().items():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
        for generator in self._generators():
            tensors["generator.average"] = generator.get_state()
        state: dict[str, Any] = {
            "config": asdict(self.config),
            "progress": asdict(self.progress),
            # a key that older checkpoints have
            "told": self._arguments(),
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.masked is not None:
            state["masks"] = {"plan": self.masked.plan.to_json(), "share": self.masked.share}
        # tied parameters and views share memory, which the file format takes once only
        write_checkpoint(folder, Checkpoint(self.progress.step, state, _unshared(tensors)))
        self.tell("checkpoint", epoch)

    def restore(self) -> None:
        """Load the newest whole checkpoint, if there is one.

        Raises:
            RunFolderError: it is of another config, of other data or of another model.
            StageFailed: other processes found another one.
        """
        stored = None
        if self.folder is not None:
            stored = read_newest(
                self.folder, lambda error: self.tell("damaged_checkpoint", 0, reason=str(error))
            )
        self.ranks.agree(
            None if self.folder is None else stored.step if stored else 0,
            "distill: checkpoint_dir must hold as many steps in every process",
            "give a folder that all of them can read, or remove it to start over",
        )
        if self.folder is None or stored is None:
            return
        self._check_same(stored.state)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in stored.tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        try:
            for part, module in self._modules().items():
                module.load_state_dict(parts.get(part, {}))
        except RuntimeError as error:
            raise RunFolderError(
                f"distill: student must have the shapes of the checkpoint in {self.folder}, "
                f"got others: {str(error).splitlines()[-1].strip()}"
            ) from None
        self.best = parts.get("best", {})
        self._load_optimizer(parts.get("optimizer", {}))
        for generator in self._generators():
            generator.set_state(parts["generator"]["average"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(stored.state["scaler"])
        if self.masked is not None:
            masks = stored.state["masks"]
            self.masked.set(Plan.from_json(masks["plan"]), masks["share"])
        self.progress = Progress(**stored.state["progress"])
        # a kill may have come after the newest was written and before the oldest was deleted
        if self.ranks.is_first:
            tidy(self.folder, self.progress.step)
        self.tell("resume", self.progress.step // self.stream.steps_per_epoch)

    def _modules(self) -> dict[str, nn.Module]:
        """All that has weights or buffers, by the names of the parts of a checkpoint."""
        average = {} if self.average is None else {"average": self.average.module}
        return {"model": self.student, "extras": self.task.extras, **average}

    def _learning(self) -> dict[str, nn.Parameter]:
        """All that the optimizer moves, by the names it has in a checkpoint."""
        return {**self.named, **{f"extras.{name}": p for name, p in self.task.named_extras()}}

    def _generators(self) -> list[torch.Generator]:
        """The generator that timm rounds an average in bfloat16 with, which advances every step."""
        generator = getattr(self.average, "_sr_generator", None)
        return [] if generator is None else [generator]

    def _load_optimizer(self, stored: dict[str, Tensor]) -> None:
        for name, parameter in self._learning().items():
            state = self.optimizer.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                value = stored.get(f"{key}.{name}")
                if value is not None:
                    # AdamW that is not fused counts on the CPU
                    counts = key == "step" and not is_fused(self.optimizer)
                    state[key] = value if counts else value.to(parameter.device)

    def _check_same(self, state: dict[str, Any]) -> None:
        changed = self.config.differences(state["config"])
        given, stored = self._arguments(), state.get("told", {})
        for name in given:
            if not changed and given[name] != stored.get(name):
                changed = f"{name}: {stored.get(name)} -> {given[name]}"
        if changed:
            raise RunFolderError(
                f"distill: config and data must be those of the checkpoint in {self.folder}, "
                f"got others ({changed}); take another checkpoint_dir, or remove it to start over"
            )

    def _arguments(self) -> dict[str, Any]:
        """Arguments of the training besides its config, as far as they are plain data."""
        given: dict[str, Any] = {
            "processes": self.ranks.world,
            "steps per epoch": self.stream.steps_per_epoch,
            "masks": self.masked is not None,
            "gates": self.gates is not None,
            "target_loss": None if self.learnt.own is None else self.learnt.own.name,
        }
        given |= {f"teacher {name}": weights for name, weights in self.teacher_weights.items()}
        given["teachers"] = list(self.teacher_weights)
        for name in ("batch_size", "seed", "shuffle", "repeats", "augment"):
            if hasattr(self.stream.train, name):
                given[f"train.{name}"] = repr(getattr(self.stream.train, name))
        if self.masked is not None:
            schedule = vars(self.masked.schedule)
            given |= {f"masks.{name}": schedule[name] for name in schedule if name != "planner"}
            given["masks.units"] = list(self.masked.schedule.units)
        if self.gates is not None:
            for name in ("kind", "keep", "round_to", "penalties", "seed"):
                given[f"gates.{name}"] = getattr(self.gates, name)
        budget: Any = dict(self.task.extras).get("gate_budget")
        given["gate_budget"] = None if budget is None else budget.limit
        return given


def _check_parameters(named: dict[str, nn.Parameter], *, alone: bool) -> None:
    """Refuse a student that cannot learn; with gates all of it may be frozen."""
    if not named and alone:
        raise InvalidInput(
            "distill: student must have a parameter that requires a gradient, got all frozen; "
            "call student.requires_grad_(True) or on the part to train"
        )
    if any(parameter.dtype == torch.float16 for parameter in named.values()):
        raise InvalidInput(
            "distill: student must have parameters of float32, float64 or bfloat16, got "
            "float16, in which AdamW divides by squared gradients that have become 0; "
            "train student.float() with dtype='float16', or call .half() afterwards"
        )


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        key = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if key in seen and key else tensor
        seen.add(key)
    return result
