"""One micro-batch of a training, as a task of timm: forward, loss and its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from timm.task.task import TrainingTask
from torch import Tensor, nn

from vitprune_fast.bare import inside
from vitprune_fast.batches import as_input, check_labels, check_logits
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.distill.objective import Objective
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modules.modes import compiled, evaluating
from vitprune_fast.precision import autocast, resolve
from vitprune_fast.ranks import Ranks
from vitprune_fast.scoring.fused import quick_attention, standing_in
from vitprune_fast.transfer import sent


class DistillTask(TrainingTask):
    """A student, its losses, and what is trained besides the student.

    ``trainable_module`` is the student that is optimised, averaged and saved. What runs is the same
    module, its compiled or distributed wrapper, or the dense copy of its live part: :meth:`run_on`.

    Args:
        student: trained in place.
        objective: the loss; its projectors learn too.
        config: precision and compilation.
        gates: attached to the student; their penalty joins the loss.
        gate_budget: as above.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        config: DistillConfig,
        gates: nn.Module | None = None,
        gate_budget: nn.Module | None = None,
    ) -> None:
        weight = next(student.parameters())
        super().__init__(device=weight.device, dtype=weight.dtype, verbose=False)
        self.trainable_module = student
        self.objective = objective
        # what is trained and is not part of the student
        self.extras = nn.ModuleDict()
        for name, module in (("gates", gates), ("gate_budget", gate_budget)):
            if module is not None:
                self.extras[name] = module
        if len(objective.projectors):
            self.extras["projectors"] = objective.projectors
        self._config = config
        self._dtype = resolve("distill", config.dtype, weight.device)
        self._ranks = Ranks.current()
        self._watching = ExitStack()
        # in a tuple: the copy of the live part is no part of the task
        self._runner: tuple[Any, ...] = ()
        self._sums_itself = False
        self._quick: dict[nn.Module, Any] = {}
        # smallest and largest label of batches that are refused late, and the number of classes
        self._seen_labels: list[tuple[Tensor, int]] = []
        self.done = 0.0
        self.generator = torch.Generator()

    def train(self, mode: bool = True) -> DistillTask:
        """Set the mode of the student and of what runs in its place."""
        super().train(mode)
        for runner in self._runner:
            runner.train(mode)
        return self

    def keep_training(self) -> None:
        """Restore the training mode, which e.g. an event listener may have changed.

        Reads a flag of each part, not of every module: this is asked in every step.
        """
        parts = (self.trainable_module, *self.extras.values(), *self._runner)
        if not all(part.training for part in parts):
            self.train()

    def named_extras(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are trained besides the student's, each once."""
        return self.extras.named_parameters()

    def run_on(self, module: nn.Module, *, whole: bool) -> None:
        """Compute with ``module`` from now on.

        Args:
            module: the student, or the copy of its live part.
            whole: it is the student itself, whose gradients DistributedDataParallel sums up.
        """
        self.stop_running()
        self._watching.__enter__()
        runner: Any = module
        if self._config.compile:
            runner = compiled(runner)
        self._sums_itself = whole and self._ranks.world > 1
        if self._sums_itself:
            from torch.nn.parallel import DistributedDataParallel

            devices = [self.device] if self.device.type == "cuda" else None
            runner = DistributedDataParallel(runner, device_ids=devices)
        self._watch = self._watching.enter_context(self.objective.watching(runner))
        self._quick = quick_attention(module)
        self._runner = (runner,)

    def stop_running(self) -> None:
        """Remove the hooks of what ran."""
        self._watching.close()
        self._runner, self._quick = (), {}

    def in_a_step(self) -> AbstractContextManager:
        """Context of a forward pass and its backward: attention in its faster form."""
        return standing_in(self._quick)

    def no_sync(self) -> AbstractContextManager:
        """Keep gradients on this process, for all but the last micro-batch of a step."""
        return self._runner[0].no_sync() if self._sums_itself else nullcontext()

    def autocast(self) -> AbstractContextManager:
        """Context in which the student computes in the precision of the config."""
        return autocast(self._dtype, self.device)

    def forward(
        self, input: Tensor, target: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Forward and loss.

        Labels without a class are refused here where the host has them and no other process would
        wait for this one. Else they make the loss NaN, and :meth:`check_seen_labels` refuses them.

        Args:
            input: images ``(B, C, H, W)`` as the student takes them.
            target: labels ``(B,)`` int64 or shares ``(B, C)``.
            labels: ``(B,)`` int64, what shares were made of.

        Returns:
            ``loss``, to be differentiated; ``output``, the logits; the parts of the loss; and
            ``wrong_labels``, how many have no class, where they are not refused here.

        Raises:
            InvalidInput: logits, shares and labels do not suit each other.
        """
        answers = self.objective.ask(input)
        runner = self._runner[0]
        with self.autocast():
            said = self._watch.output(runner(as_input(runner, input)))
        logits = said.class_BC
        objective = self.objective
        if not objective.labels or objective.own is not None:
            if objective.own is not None:
                objective.own.check_targets("distill", logits, target, self.trainable_module)
            target = sent(target, logits.device)
            loss, parts = objective(said, target, answers, self.done, self.generator)
            return self._with_penalties(loss, logits, parts)
        labels = target if target.ndim == 1 else labels
        late = labels is not None and (labels.device.type != "cpu" or self._ranks.world > 1)
        _check(logits, target, None if late else labels, self.trainable_module)
        target = sent(target, logits.device)
        wrong = None
        if labels is not None and late:
            seen = target if target.ndim == 1 else sent(labels, logits.device)
            within, wrong = self._within(seen, logits.shape[1])
            target = within if target.ndim == 1 else target
        loss, parts = self.objective(said, target, answers, self.done, self.generator)
        if wrong is not None:
            loss = loss.where(wrong == 0, math.nan)
            parts = {**parts, "wrong_labels": wrong}
        return self._with_penalties(loss, logits, parts)

    def _with_penalties(
        self, loss: Tensor, logits: Tensor, parts: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        for name in ("gates", "gate_budget"):
            if name in self.extras:
                module: Any = self.extras[name]
                penalty = module.penalty() if name == "gates" else module()
                loss = loss + penalty.to(loss)
        return {"loss": loss, "output": logits, **parts}

    def _within(self, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Labels moved into range, and how many of them that changed."""
        self._seen_labels.append((torch.stack(labels.aminmax()), classes))
        within = labels.clamp(0, classes - 1)
        return within, (within != labels).sum()

    def average_gradients(self, others: Mapping[str, Tensor]) -> None:
        """Average gradients over several processes.

        Args:
            others: tensors whose gradients DistributedDataParallel does not average.
        """
        gradients = [t.grad for t in others.values() if t.grad is not None]
        for dtype in sorted({g.dtype for g in gradients}, key=str):
            same = [g for g in gradients if g.dtype == dtype]
            flat = torch.cat([g.flatten() for g in same])
            torch.distributed.all_reduce(flat)
            flat /= self._ranks.world
            for gradient, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def average_values(self, values: list[float]) -> list[float]:
        """Means over processes, so that all decide the same; with several, waits for the device."""
        if self._ranks.world == 1:
            return values
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.average_tensor(together).tolist()

    @torch.no_grad()
    def average_tensor(self, values: Tensor) -> Tensor:
        """The same of a tensor on the device, where it stays; it may be changed in place."""
        if self._ranks.world > 1:
            torch.distributed.all_reduce(values)
            values /= self._ranks.world
        return values

    def check_seen_labels(self, *, wrong: bool) -> None:
        """Refuse labels without a class among those that were not refused when they came.

        Their losses were NaN, so that no step was taken with them.

        Args:
            wrong: whether there are some since this was last asked, here or in another process.

        Raises:
            InvalidInput: as said, in all processes.
        """
        seen, self._seen_labels = self._seen_labels, []
        if wrong:
            classes = seen[0][1]
            check_labels("distill", torch.stack([bounds for bounds, _ in seen]), classes)
            raise InvalidInput(
                f"distill: labels must lie in 0..{classes - 1} like the classes of the model, got "
                "others in another process"
            )

    def forward_macs(self, images: Tensor) -> tuple[int, int]:
        """Multiply-accumulates of one image in a forward of what runs, and of all teachers.

        Args:
            images: of which the first is looked at.
        """
        from vitprune_fast.planning.cost import count_macs

        runner, one = self._runner[0], images[:1]
        module = inside(runner)
        with evaluating(module):
            student = count_macs(lambda: module(as_input(module, one)))
            return student, count_macs(lambda: self.objective.ask(one))


def _check(logits: Tensor, target: Tensor, labels: Tensor | None, student: nn.Module) -> None:
    """Refuse what is wrong, as far as that shows without waiting for a device or a process."""
    check_logits("distill", logits, torch.zeros(len(target), dtype=torch.int64), student)
    if labels is not None:
        check_labels("distill", labels, logits.shape[1])
