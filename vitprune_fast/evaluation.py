"""How often a model is right, and how often it agrees with another one, in whole numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprune_fast.bare import bare
from vitprune_fast.batches import Numbered, as_input, logits_of, own
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modules.modes import evaluating
from vitprune_fast.precision import Precision, computing_in, device_of, resolve
from vitprune_fast.ranks import Ranks
from vitprune_fast.target_loss import LossLike, TargetLoss


@dataclass(frozen=True)
class Evaluation:
    """Counts over the samples of one pass.

    Attributes:
        samples: how many were seen.
        top1_count: the label has the largest logit.
        top5_count: the label is among the five largest logits, or among all when there are fewer.
        agreement_count: the largest logit is that of the teacher; None without a teacher.
        loss_sum: cross-entropy in nats, or the loss that was asked for, summed in fp64 over the
            samples with finite logits.
        nonfinite_count: samples with a NaN or infinite logit; they count as wrong.
        by_loss: a loss was asked for: of its targets there is no right answer to count, so that the
            counts of right ones and of agreement are 0, and their shares NaN.
    """

    samples: int
    top1_count: int
    top5_count: int
    agreement_count: int | None
    loss_sum: float
    nonfinite_count: int = 0
    by_loss: bool = False

    def __str__(self) -> str:
        """Shares and the mean loss, as one line."""
        parts = [f"{self.samples} samples"]
        if not self.by_loss:
            parts += [f"top-1 {self.top1:.2%}", f"top-5 {self.top5:.2%}"]
        if self.agreement is not None:
            parts.append(f"agreement {self.agreement:.2%}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if self.nonfinite_count:
            parts.append(f"{self.nonfinite_count} not finite")
        return f"Evaluation({', '.join(parts)})"

    @property
    def top1(self) -> float:
        """Share of samples in ``[0, 1]``; NaN where a loss was asked for."""
        return math.nan if self.by_loss else self.top1_count / self.samples

    @property
    def top5(self) -> float:
        """Share of samples in ``[0, 1]``; NaN where a loss was asked for."""
        return math.nan if self.by_loss else self.top5_count / self.samples

    @property
    def agreement(self) -> float | None:
        """Share of samples in ``[0, 1]``."""
        return None if self.agreement_count is None else self.agreement_count / self.samples

    @property
    def loss(self) -> float | None:
        """Mean of the loss, cross-entropy in nats; None when no logits were finite."""
        finite = self.samples - self.nonfinite_count
        return self.loss_sum / finite if finite else None


def evaluate(
    model: nn.Module,
    batches: Iterable[Sequence[Any]] | Numbered,
    teacher: nn.Module | None = None,
    *,
    loss: LossLike | None = None,
    dtype: Precision | torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Run a model over labelled images; both models come back in the modes they had.

    Args:
        model: maps images to logits ``(B, C)`` of two classes or more.
        batches: (images ``(B, C, H, W)`` floating, labels: B integers in ``[0, C)``, ...); images
            go to the device and dtype of each model's parameters.
        teacher: another model on the same device and classes, to agree with.
        loss: in place of cross-entropy, as :func:`vitprune_fast.score` takes it; then nothing else
            is measured, and batches have its targets. Not with a teacher.
        dtype: that both compute in, by copies of their weights (see ``precision.py``): ``auto`` is
            bfloat16 on a GPU that has it and float32 elsewhere; None is as each model is. Logits
            are compared and losses taken in float32 at least.
        ranks: the processes that share batches with numbers, such as those of a `data.Loader`: each
            reads its own, and all call and get the counts of all. None is this one alone; of other
            batches every process counts all.

    Returns:
        The counts, without images that could not be read; they do not depend on how the samples are
        batched, up to the rounding of logits.

    Raises:
        InvalidInput: no samples, a batch or logits of another form, a label outside the classes,
            another number of classes in the teacher, a model without a classifier, or an unknown
            ``dtype`` or ``loss``.
        UnsupportedArchitecture: the model holds adapters.
    """
    inner, target_loss = bare("evaluate", model), TargetLoss.of("evaluate", loss)
    target_loss.check("evaluate", inner)
    if loss is not None and teacher is not None:
        raise InvalidInput(
            "evaluate: teacher must be None with a loss, got both; agreement is of largest logits, "
            "so evaluate the two one by one"
        )
    counts, device = _Counts(inner, target_loss, agrees=teacher is not None), device_of(model)
    ranks = ranks if ranks and isinstance(batches, Numbered) else Ranks()
    computed = resolve("evaluate", dtype, device)
    # as it was given: a wrapper may be there to run it faster
    with evaluating(model, teacher), computing_in(computed, model, teacher):
        both, targets = (inner, teacher), target_loss.targets
        for images, labels in own("evaluate", batches, ranks, device, *both, targets=targets):
            logits = _logits(model, images)
            other = None if teacher is None else _logits(teacher, images)
            counts.add(logits, labels, other)
    if isinstance(batches, Numbered):
        batches.share(ranks)
    return counts.result(ranks)


def evaluate_beside(
    dense: nn.Module,
    others: Sequence[nn.Module],
    batches: Iterable[Sequence[Any]] | Numbered,
    *,
    dtype: Precision | torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> list[Evaluation]:
    """Run several models over the same images, each of which is read once.

    Args:
        dense: the model that the others agree with, or not.
        others: on the same device, with the same classes.
        batches: as :func:`evaluate` takes them.
        dtype: as above.
        ranks: as above.

    Returns:
        That of ``dense``, then that of each other model: what ``evaluate`` gives for it with
        ``dense`` for a teacher.

    Raises:
        InvalidInput: as ``evaluate``.
    """
    loss = TargetLoss.of("evaluate", None)
    inner = [bare("evaluate", model) for model in (dense, *others)]
    for each in inner:
        loss.check("evaluate", each)
    first, *rest = (_Counts(each, loss, agrees=k > 0) for k, each in enumerate(inner))
    device = device_of(dense)
    ranks = ranks if ranks and isinstance(batches, Numbered) else Ranks()
    computed = resolve("evaluate", dtype, device)
    with evaluating(dense, *others), computing_in(computed, dense, *others):
        for images, labels in own("evaluate", batches, ranks, device, *inner):
            wanted = _logits(dense, images)
            first.add(wanted, labels)
            for counts, model in zip(rest, others, strict=True):
                counts.add(_logits(model, images), labels, wanted)
    if isinstance(batches, Numbered):
        batches.share(ranks)
    return [counts.result(ranks) for counts in (first, *rest)]


def standard_error(top1: float, images: int) -> float:
    """Of a share of right answers: ``sqrt(p (1 - p) / n)``."""
    return math.sqrt(top1 * (1 - top1) / images)


def wilson(count: int, samples: int) -> tuple[float, float]:
    """The 95 % interval of a share of which ``count`` of ``samples`` were seen.

    Reference: Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927).

    Returns:
        Its ends, in ``[0, 1]``. They say what other images like these may give; the difference of
        two models on the same images is known better than that.
    """
    # of the normal distribution, 0.975
    z = 1.959963984540054
    share, room = count / samples, z * z / samples
    middle = (share + room / 2) / (1 + room)
    half = math.sqrt(share * (1 - share) * room + room * room / 4) / (1 + room)
    return max(0.0, middle - half), min(1.0, middle + half)


class _Counts:
    """The sums of one model."""

    def __init__(self, model: nn.Module, loss: TargetLoss, *, agrees: bool) -> None:
        self.model, self.loss, self.agrees = model, loss, agrees
        self.samples = self.top1 = self.top5 = self.agreement = self.nonfinite = 0
        self.losses: list[float] = []

    def add(self, logits: Tensor, labels: Tensor, other: Tensor | None = None) -> None:
        """Count one batch of logits ``(B, C)``; ``other`` is that of the model to agree with."""
        self.loss.check_targets("evaluate", logits, labels, self.model)
        labels = labels.to(logits.device)
        if self.loss.name != "ce":
            each = self.loss.each("evaluate", logits, labels)
            finite = logits.flatten(1).isfinite().all(1)
            self.samples += len(each)
            self.nonfinite += int((~finite).sum())
            self.losses += each[finite].tolist()
            return
        if other is not None and other.shape != logits.shape:
            raise InvalidInput(
                f"evaluate: teacher must give logits of shape {tuple(logits.shape)}, "
                f"got {tuple(other.shape)}"
            )
        logits = logits.float()
        finite = logits.isfinite().all(1)
        ranked = _ranked(logits)[:, :5]
        hits = (ranked == labels[:, None]) & finite[:, None]
        self.samples += len(labels)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        self.nonfinite += int((~finite).sum())
        self.losses += F.cross_entropy(logits[finite], labels[finite], reduction="none").tolist()
        if other is not None:
            other = other.float()
            both = finite & other.isfinite().all(1)
            self.agreement += int(((ranked[:, 0] == _ranked(other)[:, 0]) & both).sum())

    def result(self, ranks: Ranks) -> Evaluation:
        """The counts of all processes, which call together."""
        mine = [self.samples, self.top1, self.top5, self.agreement, self.nonfinite]
        parts = [json.loads(text) for text in ranks.texts(json.dumps([mine, self.losses]))]
        counts = [sum(column) for column in zip(*(part[0] for part in parts), strict=True)]
        samples, top1, top5, agreement, nonfinite = counts
        if samples == 0:
            raise InvalidInput(
                "evaluate: batches must hold at least one sample that can be read, got none"
            )
        return Evaluation(
            samples=samples,
            top1_count=top1,
            top5_count=top5,
            agreement_count=agreement if self.agrees else None,
            # exact, so that other batches and other processes give the same sum
            loss_sum=math.fsum(loss for part in parts for loss in part[1]),
            nonfinite_count=nonfinite,
            by_loss=self.loss.name != "ce",
        )


@torch.inference_mode()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return logits_of(model(as_input(model, images)))


def _ranked(logits: Tensor) -> Tensor:
    """Classes by falling logit; equal ones by number, which ``topk`` and ``argmax`` leave open."""
    return logits.sort(dim=1, descending=True, stable=True).indices
