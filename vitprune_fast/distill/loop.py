"""Train a model, alone or towards a teacher's answers; stop anywhere, go on to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune_fast.batches import as_input, check_logits, unpack
from vitprune_fast.distill.checkpoints import Checkpoint, read_newest, tidy, write_checkpoint
from vitprune_fast.distill.config import DistillConfig
from vitprune_fast.distill.losses import cross_entropy, soft_kd
from vitprune_fast.errors import DamagedFile, InvalidInput, RunFolderError, StageFailed
from vitprune_fast.evaluation import evaluate
from vitprune_fast.modes import evaluating, keeping_modes
from vitprune_fast.randomness import seeded

Event = dict[str, Any]
Batches = Iterable[Sequence[Any]]


@dataclass(frozen=True)
class DistillResult:
    """What came of a run.

    Attributes:
        model: the student that was given, trained in place.
        history: one entry per epoch: epoch, step, lr, loss, ce, kd (None without a teacher),
            skipped, and with validation images val_top1, val_loss, val_agreement.
        best_epoch: epoch of the best validation top-1, the earliest of equals; None without
            validation images.
        best_top1: that top-1, a share.
        skipped_steps: steps left out for a non-finite loss or gradient.
        finished: False when ``stop`` ended the run early; the same call goes on from there.
    """

    model: nn.Module
    history: list[Event]
    best_epoch: int | None
    best_top1: float | None
    skipped_steps: int
    finished: bool = True


@dataclass
class _Progress:
    """The counters of a run; with weights and optimizer all that a checkpoint holds."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_epoch: int | None = None
    best_top1: float | None = None
    history: list[Event] = field(default_factory=list)
    # sums over this epoch's steps that were not skipped
    epoch_sums: dict[str, float] = field(default_factory=dict)
    epoch_steps: int = 0
    epoch_skipped: int = 0


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Batches,
    val: Batches | None,
    config: DistillConfig,
    *,
    checkpoint_dir: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> DistillResult:
    """Train ``student`` in place with ``(1 - alpha) * CE(labels) + alpha * KD(teacher)``.

    AdamW; linear warm-up and cosine per step; gradient clipping. A step whose loss or gradient is
    not finite moves no weight and is counted. A DeiT with a distillation token learns labels with
    its class head and the teacher with its distillation head; evaluated, it averages both.

    Every step draws from generators set from (seed, step), and ``train.epoch(e, start)`` (see
    ``data.Loader``) gives batch k of epoch e directly, so a run that goes on from a checkpoint ends
    with the bits of one that was never stopped (same machine, versions and threads). Another
    iterable is read from its first batch, with generators set from (seed, epoch, batch); its own
    order must depend on nothing else.

    Args:
        student: maps images to logits ``(B, C)``; its modes come back as they were.
        teacher: likewise, on the same device; evaluated without gradients and left as it was. None
            trains on labels alone.
        train: (images ``(B, C, H, W)`` floating, labels: B integers, ...) with a length, read once
            per epoch; images go to the device and dtype of each model.
        val: likewise, read again after every epoch; it decides only with ``keep="best"``.
        config: the settings.
        checkpoint_dir: written after every epoch and ``checkpoint_steps``; the newest whole
            checkpoint in it is where the run goes on. None writes nothing.
        on_event: told about ``resume``, ``damaged_checkpoint``, ``step``, ``skipped_step``,
            ``epoch`` and ``checkpoint``; each has ``stage``, ``event``, ``epoch``, ``step`` (steps
            done). A call that loads a checkpoint says ``resume`` first: what earlier calls told
            about larger steps is void. A call that says nothing of it starts at step 0.
        stop: asked after every step; True writes a checkpoint and returns.

    Raises:
        InvalidInput: no training batches or none of that form, nothing to train or in float16,
            ``keep="best"`` without ``val``, or outputs that do not fit each other.
        RunFolderError: the checkpoint is of another config or model, or cannot be written.
        StageFailed: more than ``max_bad_steps`` steps in a row were not finite.
    """
    if config.keep == "best" and val is None:
        raise InvalidInput("distill: val must be given to keep the best epoch, got None")
    teacher = teacher if config.alpha > 0 else None
    run = _Run(student, teacher, train, val, config, checkpoint_dir, on_event, stop)
    with keeping_modes(student), evaluating(teacher), _two_heads(student, teacher is not None):
        return run.go()


@contextmanager
def _two_heads(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let a model with a distillation token return both heads' logits while it trains."""
    if not wanted or not hasattr(model, "set_distilled_training"):
        yield
        return
    before = model.distilled_training
    switch: Any = model.set_distilled_training
    switch(True)
    try:
        yield
    finally:
        switch(before)


class _Run:
    """One call of ``distill``."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        train: Batches,
        val: Batches | None,
        config: DistillConfig,
        checkpoint_dir: str | Path | None,
        on_event: Callable[[Event], None] | None,
        stop: Callable[[], bool] | None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.train = train
        self.val = val
        self.config = config
        self.folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self.on_event = on_event
        self.stop = stop or (lambda: False)
        self.steps_per_epoch = len(train) if hasattr(train, "__len__") else 0  # type: ignore[arg-type]
        if self.steps_per_epoch == 0:
            raise InvalidInput("distill: train must have a length of at least one batch, got none")
        self.named = {n: p for n, p in student.named_parameters() if p.requires_grad}
        if not self.named:
            raise InvalidInput(
                "distill: student must have a parameter that requires a gradient, got all frozen; "
                "call student.requires_grad_(True) or on the part to train"
            )
        if any(parameter.dtype == torch.float16 for parameter in self.named.values()):
            raise InvalidInput(
                "distill: student must have parameters of float32, float64 or bfloat16, got "
                "float16, in which AdamW divides by squared gradients that have become 0; "
                "train student.float() and call .half() afterwards"
            )
        self.optimizer = _adamw(self.named, config)
        self.progress = _Progress()
        self.best: dict[str, torch.Tensor] = {}

    def go(self) -> DistillResult:
        progress = self.progress = self._resume()
        total = self.steps_per_epoch * self.config.epochs
        while progress.step < total:
            epoch, start = divmod(progress.step, self.steps_per_epoch)
            if not self._epoch(epoch, start):
                return self._result(finished=False)
        if self.config.keep == "best":
            self.student.load_state_dict(self.best)
        return self._result(finished=True)

    def _epoch(self, epoch: int, start: int) -> bool:
        """Run the rest of an epoch; False when asked to stop in it."""
        progress, config = self.progress, self.config
        self.student.train()
        clock, images_seen = time.perf_counter(), 0
        for index, batch in _batches(self.train, config.seed, epoch, start):
            images, labels = unpack("distill", batch, self.student, self.teacher)
            lr = learning_rate(progress.step, self.steps_per_epoch, config)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            parts = self._step(images, labels)
            progress.step += 1
            images_seen += len(images)
            if config.log_steps and progress.step % config.log_steps == 0:
                rate = images_seen / (time.perf_counter() - clock)
                steps = self.steps_per_epoch * config.epochs
                self._tell("step", epoch, steps=steps, lr=lr, images_per_s=rate, **parts)
            if index + 1 == self.steps_per_epoch:
                self._end_epoch(epoch, lr)
            stopping = self.stop()
            due = config.checkpoint_steps and progress.step % config.checkpoint_steps == 0
            if stopping or due or index + 1 == self.steps_per_epoch:
                self._save(epoch)
            if stopping:
                return False
        if progress.step != (epoch + 1) * self.steps_per_epoch:
            raise InvalidInput(
                f"distill: train must give {self.steps_per_epoch} batches as its length says, "
                f"got {progress.step - epoch * self.steps_per_epoch}"
            )
        return True

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float | None]:
        """Take one optimizer step, or skip it; return the parts of the loss."""
        progress, config = self.progress, self.config
        self.optimizer.zero_grad(set_to_none=True)
        with seeded(config.seed, "step", progress.step):
            loss, parts = self._loss(images, labels)
            loss.backward()
        limit = config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self.named.values()), limit)
        values = {name: float(part) for name, part in parts.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(float(norm))):
            self._skip(values["loss"], float(norm))
            return dict.fromkeys(values)
        self.optimizer.step()
        progress.skipped_in_a_row = 0
        progress.epoch_steps += 1
        for name, value in values.items():
            progress.epoch_sums[name] = progress.epoch_sums.get(name, 0.0) + value
        return {**values, "grad_norm": float(norm)}

    def _loss(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config = self.config
        outputs = self.student(as_input(self.student, images))
        class_logits, teacher_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        check_logits("distill", class_logits, labels)
        ce = cross_entropy(class_logits, labels.to(class_logits.device), config.label_smoothing)
        if self.teacher is None:
            return ce, {"loss": ce.detach(), "ce": ce.detach()}
        with torch.no_grad():
            wanted = self.teacher(as_input(self.teacher, images))
        if wanted.shape != teacher_logits.shape:
            raise InvalidInput(
                f"distill: teacher must give logits of shape {tuple(teacher_logits.shape)} like "
                f"the student, got {tuple(wanted.shape)}"
            )
        kd = soft_kd(teacher_logits, wanted, config.temperature)
        loss = (1 - config.alpha) * ce + config.alpha * kd
        return loss, {"loss": loss.detach(), "ce": ce.detach(), "kd": kd.detach()}

    def _skip(self, loss: float, norm: float) -> None:
        """Count a step that is not finite; weights and optimizer stay as they were."""
        progress, config = self.progress, self.config
        progress.skipped += 1
        progress.epoch_skipped += 1
        progress.skipped_in_a_row += 1
        epoch = progress.step // self.steps_per_epoch
        self._tell("skipped_step", epoch, loss_text=str(loss), grad_norm_text=str(norm))
        if progress.skipped_in_a_row > config.max_bad_steps:
            raise StageFailed(
                f"distill: at most {config.max_bad_steps} steps in a row may have a non-finite "
                f"loss or gradient, got {progress.skipped_in_a_row} up to step {progress.step + 1} "
                f"(loss {loss}, gradient norm {norm}); lower lr or raise warmup_epochs"
            )

    def _end_epoch(self, epoch: int, lr: float) -> None:
        """Average the epoch, look at the validation images, remember the best."""
        progress = self.progress
        steps = progress.epoch_steps
        means = {
            name: progress.epoch_sums[name] / steps
            if steps and name in progress.epoch_sums
            else None
            for name in ("loss", "ce", "kd")
        }
        entry: Event = {"epoch": epoch, "step": progress.step, "lr": lr, **means}
        entry["skipped"] = progress.epoch_skipped
        progress.epoch_sums, progress.epoch_steps, progress.epoch_skipped = {}, 0, 0
        if self.val is not None:
            seen = evaluate(self.student, self.val, self.teacher)
            entry |= {"val_top1": seen.top1, "val_loss": seen.loss}
            entry["val_agreement"] = seen.agreement
            if progress.best_top1 is None or seen.top1 > progress.best_top1:
                progress.best_epoch, progress.best_top1 = epoch, seen.top1
                if self.config.keep == "best":
                    self.best = {n: t.clone() for n, t in self.student.state_dict().items()}
        progress.history.append(entry)
        self._tell("epoch", **entry)

    def _tell(self, event: str, epoch: int, **values: Any) -> None:
        if self.on_event is not None:
            place = {"epoch": epoch, "step": self.progress.step}
            self.on_event({"stage": "distill", "event": event, **place, **values})

    def _result(self, *, finished: bool) -> DistillResult:
        progress = self.progress
        return DistillResult(
            self.student,
            progress.history,
            progress.best_epoch,
            progress.best_top1,
            progress.skipped,
            finished,
        )

    def _save(self, epoch: int) -> None:
        if self.folder is None:
            return
        tensors = {f"model.{name}": t for name, t in self.student.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        state = {
            "config": asdict(self.config),
            "steps_per_epoch": self.steps_per_epoch,
            "progress": asdict(self.progress),
        }
        write_checkpoint(self.folder, Checkpoint(self.progress.step, state, tensors))
        self._tell("checkpoint", epoch)

    def _resume(self) -> _Progress:
        """Load the newest whole checkpoint, if there is one."""
        if self.folder is None:
            return _Progress()
        stored = read_newest(self.folder, self._tell_damage)
        if stored is None:
            return _Progress()
        changed = self.config.differences(stored.state["config"])
        steps = stored.state["steps_per_epoch"]
        if steps != self.steps_per_epoch:
            changed = f"steps per epoch: {steps} -> {self.steps_per_epoch}"
        if changed:
            raise RunFolderError(
                f"distill: config and data must be those of the checkpoint in {self.folder}, "
                f"got others ({changed}); take another checkpoint_dir"
            )
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, tensor in stored.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        try:
            self.student.load_state_dict(parts["model"])
        except RuntimeError as error:
            raise RunFolderError(
                f"distill: student must have the shapes of the checkpoint in {self.folder}, "
                f"got others: {str(error).splitlines()[-1].strip()}"
            ) from None
        self.best = parts["best"]
        for name, parameter in self.named.items():
            state = self.optimizer.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = parts["optimizer"].get(f"{key}.{name}")
                if value is not None:
                    # the step count stays on the CPU, where AdamW keeps it
                    state[key] = value if key == "step" else value.to(parameter.device)
        progress = _Progress(**stored.state["progress"])
        # a kill may have come between the newest checkpoint and the end of the oldest
        tidy(self.folder, progress.step)
        self.progress = progress
        self._tell("resume", progress.step // self.steps_per_epoch)
        return progress

    def _tell_damage(self, error: DamagedFile) -> None:
        self._tell("damaged_checkpoint", 0, reason=str(error))


def learning_rate(step: int, steps_per_epoch: int, config: DistillConfig) -> float:
    """Learning rate of a step: linear from 0 to ``lr`` over the warm-up, then half a cosine."""
    warmup = min(config.warmup_epochs, config.epochs / 2) * steps_per_epoch
    total = config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / (math.floor(warmup) + 1)
    share = (step - warmup) / max(total - 1 - warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * share)) / 2


def _adamw(named: dict[str, nn.Parameter], config: DistillConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only: not biases, norms, or scales."""
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)


def _batches(train: Batches, seed: int, epoch: int, start: int) -> Iterator[tuple[int, Any]]:
    """Yield (number, batch) of an epoch from batch ``start`` on."""
    if hasattr(train, "epoch"):
        yield from enumerate(train.epoch(epoch, start), start)  # type: ignore[attr-defined]
        return
    # a plain loader draws its order and its samples' augmentation from the global generators
    with seeded(seed, "order", epoch):
        iterator = iter(train)
    for index in range(len(train)):  # type: ignore[arg-type]
        with seeded(seed, "batch", epoch * len(train) + index):  # type: ignore[arg-type]
            batch = next(iterator, None)
        if batch is None:
            return
        if index >= start:
            yield index, batch
