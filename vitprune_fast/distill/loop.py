"""Train a model, alone or with teachers; stopped anywhere, it resumes to the same bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast.bare import bare
from vitprune_fast.batches import Numbered, as_input, check_whole, classes_of, own
from vitprune_fast.config.distill import DistillConfig, loss_class
from vitprune_fast.distill.masks import MaskSchedule
from vitprune_fast.distill.optim import as_trained, is_fused, learning_rate
from vitprune_fast.distill.progress import Event
from vitprune_fast.distill.rate import IMAGES, State, size_of, start_rate, state_of
from vitprune_fast.distill.state import Batches, Learnt, TrainingState
from vitprune_fast.distill.stream import MicroBatch
from vitprune_fast.distill.tally import Outcome
from vitprune_fast.distill.teachers import Teacher, TeacherSet
from vitprune_fast.distill.throughput import Throughput
from vitprune_fast.errors import InvalidInput, StageFailed
from vitprune_fast.evaluation import evaluate, standard_error
from vitprune_fast.gates import BudgetLoss, Gates
from vitprune_fast.modules.behaviour import check_behaviour
from vitprune_fast.modules.modes import check_recordable, evaluating, keeping_modes
from vitprune_fast.planning import Plan
from vitprune_fast.precision import computing_in, device_of, is_half, resolved_name
from vitprune_fast.randomness import derive_seed, seeded
from vitprune_fast.ranks import Ranks
from vitprune_fast.surgery import prune
from vitprune_fast.target_loss import LossLike, TargetLoss

Teachers = nn.Module | Teacher | TeacherSet | Sequence[nn.Module]

# steps between two reads of their outcomes, where no events ask for one
_LOOK = 100


@dataclass(frozen=True)
class DistillResult:
    """The result of a training.

    Attributes:
        model: the student that was given, trained in place, without a wrapper around it; with
            ``ema`` it holds the average.
        history: one entry per epoch: epoch, step, lr, loss, ce, kd and every loss by its name
            (None without a teacher), skipped, and with validation images val_top1, val_loss,
            val_agreement.
        best_epoch: epoch of the best validation top-1, the earliest of equals, with ``masks`` among
            those that ended with the last ones; None where, unless ``keep="last"``, no epoch was
            better than the student as it was given, and without validation images.
        best_top1: that top-1, a share.
        skipped_steps: steps left out for a non-finite loss or gradient.
        finished: False when ``stop`` ended the run early; the same call goes on from there.
        plan: the units that are live in the end, with ``masks``: ``prune(model, plan)`` computes
            what was trained. None without.
        start: what was found before the first step: where ``lr`` is unset peak_lr, and distance,
            reach and size, which it was chosen by (see ``rate.State``); unless ``keep="last"``
            val_top1, val_loss and val_agreement of the student as it was given.
        best_loss: where top-1 says nothing (a target_loss, or a student without a classifier), the
            least validation loss, by which best_epoch was chosen; else None.
    """

    model: nn.Module
    history: list[Event]
    best_epoch: int | None
    best_top1: float | None
    skipped_steps: int
    finished: bool = True
    plan: Plan | None = None
    start: Event = field(default_factory=dict)
    best_loss: float | None = None


@torch.inference_mode(False)
def distill(
    student: nn.Module,
    teacher: Teachers | None,
    train: Batches,
    val: Batches | None,
    config: DistillConfig,
    *,
    target_loss: LossLike | None = None,
    gates: Gates | None = None,
    gate_budget: BudgetLoss | None = None,
    masks: MaskSchedule | None = None,
    checkpoint_dir: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> DistillResult:
    """Train ``student`` in place with the losses of ``config``, on labels and towards teachers.

    Linear warm-up and cosine per step, up to a learning rate that suits the state of the student
    where none is given; gradient clipping. A step whose loss or gradient is not finite moves no
    weight and is counted. A DeiT with a distillation token learns labels with its class head and
    the teacher's logits with its distillation head; evaluated, it averages both.

    With all that learns on GPUs a step waits for none of them: what steps came to is read every
    ``log_steps`` (0: 100) steps, and before a checkpoint, a change of masks and the end of an
    epoch.

    Every step draws from generators set from (seed, step), and ``train.epoch(e, start)`` (see
    ``data.Loader``) gives batch k of epoch e directly, so a run that goes on from a checkpoint ends
    with the bits of one that was never stopped (same machine, versions and threads). Another
    iterable is read from its first batch, with generators set from (seed, epoch, batch); its own
    order must depend on nothing else.

    Where torch.distributed is initialised, its processes share the work: process r takes batches r,
    r + world, ... of the stream, gradients are averaged (by DistributedDataParallel, but with
    ``masks`` by one all-reduce per step), and the first process writes checkpoints into a folder
    that all of them read. Of a ``data.Loader`` no process reads the batches of another, and they
    share ``val`` as well; another ``val`` every one of them reads whole.

    Args:
        student: maps images to logits ``(B, C)``; its modes come back as they were. One without a
            classifier learns by losses of features and states alone, and reads no labels; where
            validation decides, it goes by the least of those losses.
        teacher: as above, or a ``Teacher`` with its own normalisation and size, or several of them;
            evaluated without gradients and left as it was. A plain module sees the images as the
            student does. None trains on labels alone.
        train: (images ``(B, C, H, W)`` floating, labels: B integers, ...) with a length, read once
            per epoch, and no further than its length; images go to the device and dtype of each
            model. Where ``lr`` is unset, its first images are read once more before.
        val: as above, read again after every epoch; it decides only with ``keep="best"`` and
            ``"one-se"``, which read it before the first step too: what comes back is never worse on
            it than what was given (with ``masks`` that change: than the first epoch that ended with
            the last ones), or by one standard error at most.
        config: the settings.
        target_loss: in place of the loss of labels: ``"bce"``, ``"mse"`` or a function of (outputs,
            targets) to one loss per sample, as :func:`vitprune_fast.score` takes it; batches then
            have its targets. Validation measures its mean, by which ``keep="best"`` goes. Other
            losses are weighed against it as against that of labels.
        gates: attached to the student by ``gates.attach``; they learn too, with their penalty.
        gate_budget: holds the gates' multiply-accumulates down.
        masks: train on the live part of the student, which the schedule makes smaller.
        checkpoint_dir: written after every epoch and ``checkpoint_steps``; the newest whole
            checkpoint in it is where the run goes on. None writes nothing.
        on_event: called with ``resume``, ``damaged_checkpoint``, ``start`` (where something was
            found before the first step), ``step``, ``skipped_step``, ``masks``, ``epoch`` and
            ``checkpoint``; each has ``stage``, ``event``, ``epoch``, ``step`` (steps done; of
            ``skipped_step``, which comes at the next read, those before it). A call that loads a
            checkpoint starts with ``resume``: events of earlier calls about larger steps are
            void. A call without it starts at step 0.
        stop: asked after every step; True writes a checkpoint and returns, with several processes
            at the next read.

    Raises:
        InvalidInput: no training batches or none of that form, a student without a classifier of
            two classes or more that is to learn labels, nothing to train or in float16,
            ``keep`` other than ``"last"`` without ``val`` or with gates, gates with masks or with
            ``ema``, masks of a student that computes by more than its classes, or outputs that do
            not fit each other.
        RunFolderError: the checkpoint is of another config, loss or model, or cannot be written.
        UnsupportedArchitecture: the student holds adapters.
        StageFailed: other processes have other batches or another checkpoint; or more than
            ``max_bad_steps`` steps in a row were not finite, found at a read.
    """
    student = bare("distill", student)
    check_recordable("distill", student)
    teachers = _as_set(teacher) if config.needs_teacher else None
    learnt = _learnt(student, teachers, config, target_loss)
    check_whole("distill", train, Ranks.current())
    if config.chooses and val is None:
        raise InvalidInput("distill: val must be given to keep the best epoch, got None")
    if masks is not None and gates is not None:
        raise InvalidInput("distill: gates must be None with masks, got both; fold the gates first")
    if masks is not None:
        check_behaviour(student, "distill")
    if gate_budget is not None and gates is None:
        raise InvalidInput("distill: gates must be given with a gate_budget, got None")
    if gates is not None and (config.ema or config.chooses):
        raise InvalidInput(
            "distill: ema must be 0 and keep `last` with gates, whose values are those of the last "
            f"step, got {config.ema} and `{config.keep}`"
        )
    # another machine may mean another dtype by `auto`, and would end with other bits
    config = replace(config, dtype=resolved_name("distill", config.dtype, device_of(student)))
    with (
        keeping_modes(student),
        as_trained(student, config, two_heads=teachers is not None and config.learns_logits),
    ):
        run = _Run(student, teachers, train, val, config, learnt, gates, gate_budget, masks)
        run.folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        run.on_event, run.stop = on_event, stop or (lambda: False)
        try:
            return run.go()
        finally:
            run.task.stop_running()


def _learnt(
    student: nn.Module,
    teachers: TeacherSet | None,
    config: DistillConfig,
    target_loss: LossLike | None,
) -> Learnt:
    """What the student learns beside its teachers.

    Raises:
        InvalidInput: its outputs, the settings and the loss do not go together.
    """
    if target_loss is not None:
        own_loss = TargetLoss.of("distill", target_loss, argument="target_loss")
        own_loss.check("distill", student, argument="target_loss")
        for name in ("label_smoothing", "bce_threshold", "mixup", "cutmix"):
            if getattr(config, name):
                raise InvalidInput(
                    f"distill: {name} must be unset with a target_loss, which reads the targets as "
                    f"they are, got {getattr(config, name)}"
                )
        if config.keep == "one-se":
            raise InvalidInput(
                "distill: keep must be `last` or `best` with a target_loss, got `one-se`, which "
                "counts right answers"
            )
        if teachers is not None:
            _check_suits(own_loss, config)
        return Learnt(own_loss, by_loss=True)
    inside_alone = teachers is not None and config.looks_inside and not config.learns_logits
    if classes_of(student) == 0 and inside_alone and config.label_loss == "ce":
        if config.mixes or config.keep == "one-se":
            raise InvalidInput(
                "distill: mixup and cutmix must be 0 and keep `last` or `best` for a student "
                f"without a classifier, got {config.mixup}, {config.cutmix} and `{config.keep}`"
            )
        return Learnt(None, by_loss=True)
    of_labels = TargetLoss.of("distill", "bce" if config.label_loss == "bce" else None)
    of_labels.check("distill", student, argument="target_loss")
    return Learnt(of_labels, by_loss=False)


def _check_suits(own: TargetLoss, config: DistillConfig) -> None:
    """Refuse losses by a softmax beside targets that are not one class among all."""
    by_softmax = [w for w in config.loss if loss_class(w.rpartition(":")[2]).one_class]
    if own.is_own or not by_softmax or not config.alpha:
        return
    rest = {
        "bce": "take 'soft_sigmoid', or no target_loss and label_loss='bce' where an image has one "
        "class",
        "mse": "take losses of what is inside, such as 'features' or 'hidden'",
    }[own.name]
    raise InvalidInput(
        f"distill: loss must be of what target_loss={own.name!r} teaches, got {by_softmax[0]!r}, "
        f"which compares one class among all; {rest}"
    )


def _as_set(teacher: Teachers | None) -> TeacherSet | None:
    if teacher is None or isinstance(teacher, TeacherSet):
        return teacher
    several = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    return TeacherSet([each if isinstance(each, Teacher) else Teacher(each) for each in several])


class _Run(TrainingState):
    """One call of ``distill``."""

    stop: Callable[[], bool]

    def go(self) -> DistillResult:
        self.restore()
        self._run_on_what_is_live()
        if self.progress.step == 0:
            self._start()
        while self.progress.step < self.stream.steps:
            epoch, start = divmod(self.progress.step, self.stream.steps_per_epoch)
            if not self._epoch(epoch, start):
                return self._result(finished=False)
        if self.config.chooses:
            self.student.load_state_dict(self.best)
        elif self.average is not None:
            self.student.load_state_dict(self.average.module.state_dict())
        return self._result(finished=True)

    def _run_on_what_is_live(self) -> None:
        """Point the task at the student, or at a new copy of its live part."""
        if self.masked is None:
            self.task.run_on(self.student, whole=True)
        else:
            self.task.run_on(self.masked.soft.refresh(), whole=False)
        self.task.train()
        self.throughput = Throughput(self.task)

    def _start(self) -> None:
        """Look at the student as it was given, which is the first that may be the best."""
        found: Event = {}
        # the rule is for the steps of Adam, and for a student that is not pruned on the way
        alone = self.masked is None and self.gates is None
        if self.config.lr is None and self.config.optimizer == "adamw" and alone:
            found |= self._rate()
        if self.config.chooses:
            found |= self._validated(None)
        self.progress.start = found
        if found:
            self.tell("start", 0, **found)

    def _rate(self) -> Event:
        """The peak learning rate that suits the student, and what that was seen from."""
        if self.learnt.own is not None:
            # not in nats: only the weights say what there is to lose
            state = State(math.nan, math.nan, size_of(self.student))
        else:
            state = state_of(
                self.student,
                self._agrees_with(),
                self.stream.samples(0, IMAGES),
                seed=self.config.seed,
                autocast=self.task.autocast,
                features=self.learnt.loss is None,
            )
        # the same on all processes, also where they are not the same machines
        (peak,) = self.task.average_values([start_rate(state)])
        found = {"peak_lr": peak, **vars(state)}
        return {n: None if v is None or not math.isfinite(v) else v for n, v in found.items()}

    def _epoch(self, epoch: int, start: int) -> bool:
        """Run the rest of an epoch; False when asked to stop in it."""
        progress, config = self.progress, self.config
        self.throughput.restart()
        asked = False
        for batches in self.stream.epoch(epoch, start):
            self._change_masks(epoch)
            lr = learning_rate(progress.step, self.stream.steps_per_epoch, config, self.peak)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self._step(batches)
            progress.step += 1
            self.throughput.add(batches, self.ranks.world)
            done = progress.step % self.stream.steps_per_epoch == 0
            due = done or _is_due(progress.step, config.checkpoint_steps)
            looks = due or _is_due(progress.step, config.log_steps or _LOOK)
            parts = self._look() if looks else {}
            if _is_due(progress.step, config.log_steps):
                self._tell_step(epoch, lr, parts)
            if done:
                self._end_epoch(epoch, lr)
            asked = self.stop() or asked
            # processes agree where each of them waits for its device
            shared = self.ranks.world > 1
            stopping = looks and self._any(asked) if shared else asked
            if stopping or due:
                self._look()
                self.stream.share()
                self.save(epoch)
            if stopping:
                return False
        return True

    def _any(self, asked: bool) -> bool:
        """Whether any of the processes is asked to stop."""
        return self.task.average_values([float(asked)])[0] > 0

    def _change_masks(self, epoch: int) -> None:
        masked = self.masked
        if masked is None:
            return

        def seen() -> list[Any]:
            # outcomes of the steps so far are reported before the change
            self._look()
            return self.stream.samples(epoch, masked.schedule.samples)

        if masked.update(self.progress.step, self.stream.steps, seen):
            # weights that were measured with other units live are not those of this plan
            self.progress.forget_best()
            self.best = {}
            self._run_on_what_is_live()
            self.tell(
                "masks",
                epoch,
                share=masked.share,
                alive=masked.alive(),
                attention=masked.attention,
            )

    def _step(self, batches: Sequence[MicroBatch]) -> None:
        """Take one optimizer step, or skip it where loss or gradient is not finite.

        Whether it was skipped stays on the device until :meth:`_look`.
        """
        progress, config, task = self.progress, self.config, self.task
        task.keep_training()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masked is not None:
            self.masked.soft.refresh()
        task.done = progress.step / max(self.stream.steps - 1, 1)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            parts = self._micro_step(batch, len(batches), last=batch is batches[-1])
            for name, value in parts.items():
                sums[name] = sums[name] + value if name in sums else value
        if self.ranks.world > 1:
            task.average_gradients(self._unsummed())
        if self.masked is not None:
            self.masked.soft.scatter()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm, others_norm = (
            self._norm(parameters)
            for parameters in (self.named.values(), (p for _, p in task.named_extras()))
        )
        if config.clip_norm:
            clip = nn.utils.clip_grads_with_norm_
            clip(list(self.named.values()), config.clip_norm, norm)
        means = torch.stack([each.double().to(task.device) for each in sums.values()])
        means = task.average_tensor(means / len(batches))
        parts = dict(zip(sums, means.unbind(), strict=True))
        self._move(self.tally.add(progress.step, parts, norm.double(), others_norm.double()))

    def _norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """L2 norm of all gradients together, on the device of the student."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        # without gradients torch would return one on the CPU
        none = torch.zeros((), device=self.task.device)
        return nn.utils.get_total_norm(gradients).to(none.device) if gradients else none

    def _move(self, bad: Tensor) -> None:
        """Let optimizer, average and loss scale take the step; where ``bad`` is 1 it is skipped.

        A fused optimizer reads ``bad`` on the device. For another one it is read here.
        """
        optimizer: Any = self.optimizer
        fused = is_fused(optimizer)
        if fused:
            optimizer.found_inf = bad
        if fused or not bad.item():
            optimizer.step()
            if self.average is not None and self.config.ema_every == "step":
                self.average.take(self.student, self.progress.step, bad if fused else None)
        if self.scaler.is_enabled():
            before = self.scaler.scale(torch.ones((), device=self.task.device))
            # it has seen the gradients alone; any other cause lowers the scale too
            self.scaler.update()
            after = self.scaler.scale(torch.ones((), device=self.task.device))
            self.scaler.update(torch.where(bad > 0, before / 2, after))

    def _micro_step(self, batch: MicroBatch, count: int, *, last: bool) -> dict[str, Tensor]:
        """Add one micro-batch's share to the gradients; return the parts of its loss."""
        number, seed, task = batch[0], self.config.seed, self.task
        task.generator.manual_seed(derive_seed(seed, "loss", number))
        if self.gates is not None:
            self.gates.set_step(number)
        images, target = self.stream.varied(batch, task.device)
        sums = nullcontext() if last else task.no_sync()
        # what is computed again in the backward must be computed as it was
        with seeded(seed, "step", number), sums, task.in_a_step():
            result = task(images, target, batch[2])
            self.scaler.scale(result["loss"] / count).backward()
        return {n: v.detach() for n, v in result.items() if n != "output"}

    def _unsummed(self) -> dict[str, Tensor]:
        """The tensors whose gradients are not averaged over processes yet."""
        others: dict[str, Tensor] = dict(self.task.named_extras())
        if self.masked is not None:
            others |= dict(self.masked.soft.model.named_parameters(prefix="live"))
        return others

    def _look(self) -> dict[str, float | None]:
        """Count the steps since the last look; this waits for the device.

        Returns:
            The parts of the loss of the last of them, None each where it was skipped.

        Raises:
            InvalidInput: labels that were on the device, or of several processes, have no class.
            StageFailed: too many steps in a row were left out.
        """
        parts: dict[str, float | None] = {}
        outcomes = self.tally.read()
        self.task.check_seen_labels(wrong=any(outcome.wrong_labels for outcome in outcomes))
        for outcome in outcomes:
            if outcome.finite:
                self.progress.add(outcome.parts)
                parts = {**outcome.parts, "grad_norm": outcome.norm}
            else:
                self._skip(outcome)
                parts = dict.fromkeys(outcome.parts)
        return parts

    def _skip(self, outcome: Outcome) -> None:
        """Count a step that was not finite; weights and optimizer stayed as they were."""
        progress, config, step = self.progress, self.config, outcome.step
        progress.skip()
        loss = outcome.parts["loss"]
        norm = outcome.norm if math.isfinite(outcome.others_norm) else outcome.others_norm
        epoch = step // self.stream.steps_per_epoch
        self.tell("skipped_step", epoch, step=step, loss_text=str(loss), grad_norm_text=str(norm))
        if progress.skipped_in_a_row > config.max_bad_steps:
            raise StageFailed(
                f"distill: at most {config.max_bad_steps} steps in a row may have a non-finite "
                f"loss or gradient, got {progress.skipped_in_a_row} up to step {step + 1} "
                f"(loss {loss}, gradient norm {norm}); lower lr or raise warmup_epochs"
            )

    def _end_epoch(self, epoch: int, lr: float) -> None:
        """Average the epoch, look at the validation images, remember the best."""
        progress = self.progress
        if self.average is not None and self.config.ema_every == "epoch":
            self.average.take(self.student, epoch + 1)
        entry = progress.end_epoch(epoch, lr)
        if self.val is not None:
            entry |= self._validated(epoch)
        progress.history.append(entry)
        self.tell("epoch", **entry)

    def _validated(self, epoch: int | None) -> Event:
        """Evaluate on the validation images after an epoch (None: before the first step)."""
        assert self.val is not None
        student, dtype = self._evaluated(), getattr(torch, self.config.dtype)
        # the teacher answers in its own
        with computing_in(dtype if is_half(dtype) else None, student):
            if self.learnt.by_loss:
                return self._measured(epoch, student, self.val)
            seen = evaluate(student, self.val, self._agrees_with(), ranks=self.ranks)
        noise = 0.0
        if self.config.keep == "one-se":
            right = max(seen.top1, self.progress.best_top1 or 0.0) * seen.samples
            # as if one more had been right and one more wrong: none wrong is no proof of no noise
            noise = standard_error((right + 1) / (seen.samples + 2), seen.samples)
        if self.progress.note_best(epoch, seen.top1, noise):
            self._keep_best()
        return {"val_top1": seen.top1, "val_loss": seen.loss, "val_agreement": seen.agreement}

    def _keep_best(self) -> None:
        """Keep the weights as they are now, if the best come back."""
        if self.config.chooses:
            kept = self.student if self.average is None else self.average.module
            self.best = {n: t.clone() for n, t in kept.state_dict().items()}

    def _measured(self, epoch: int | None, student: nn.Module, val: Batches) -> Event:
        """The mean of the loss that is learnt from targets, or of all that is learnt from teachers.

        The least of them is the best.
        """
        loss = self.learnt.loss
        if loss is not None:
            given: Any = loss.function if loss.is_own else loss.name
            mean = evaluate(student, val, loss=given, ranks=self.ranks).loss
        else:
            mean = self._mean_of_terms(student, val)
        least = math.inf if mean is None or math.isnan(mean) else mean
        if self.progress.note_least(epoch, least):
            self._keep_best()
        return {"val_top1": None, "val_loss": mean, "val_agreement": None}

    @torch.no_grad()
    def _mean_of_terms(self, student: nn.Module, val: Batches) -> float:
        """What the student lacks of its teachers, with the weights of the end of the run."""
        objective, total, count = self.task.objective, 0.0, 0
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "validation"))
        ranks = self.ranks if isinstance(val, Numbered) else Ranks()
        device = device_of(student)
        with evaluating(student), objective.watching(student) as watch:
            for images, _ in own("distill", val, ranks, device, student, targets="none"):
                said = watch.output(student(as_input(student, images)))
                mean, _ = objective(said, None, objective.ask(images), 1.0, generator)
                total, count = total + mean.item() * len(images), count + len(images)
        if isinstance(val, Numbered):
            val.share(ranks)
        parts = [json.loads(text) for text in ranks.texts(json.dumps([total, count]))]
        samples = sum(part[1] for part in parts)
        if not samples:
            raise InvalidInput("distill: val must hold at least one image, got none")
        return math.fsum(part[0] for part in parts) / samples

    def _evaluated(self) -> nn.Module:
        """What would be used if training ended here: averaged, and of the live part alone."""
        whole = self.student if self.average is None else self.average.module
        if self.masked is None or self.masked.plan.keeps_everything:
            return whole
        return prune(whole, self.masked.plan)

    def _agrees_with(self) -> nn.Module | None:
        """The first teacher of the student's classes, as a module that gives logits.

        A student without a classifier is compared with what its teacher pools.
        """
        for teacher in self.teachers or ():
            if self.config.learns_logits or self.learnt.loss is None:
                return teacher.as_classifier()
        return None

    def _tell_step(self, epoch: int, lr: float, parts: dict[str, float | None]) -> None:
        values: Event = {"steps": self.stream.steps, "lr": lr, **self.throughput.rates(), **parts}
        counted = self.masked or self.gates
        if counted is not None:
            values["alive"] = counted.alive()
            values["attention"] = counted.attention
        self.tell("step", epoch, **values)

    def _result(self, *, finished: bool) -> DistillResult:
        progress = self.progress
        return DistillResult(
            self.student,
            progress.history,
            progress.best_epoch,
            progress.best_top1,
            progress.skipped,
            finished,
            None if self.masked is None else self.masked.plan,
            progress.start,
            progress.best_loss,
        )


def _is_due(step: int, every: int) -> bool:
    """Whether something is done after this step; 0 never does it."""
    return every > 0 and step % every == 0
