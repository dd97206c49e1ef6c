"""How often a model is right, and how often it agrees with another one, in whole numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitprune_fast.batches import as_input, check_logits, checked
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modes import evaluating


@dataclass(frozen=True)
class Evaluation:
    """Counts over the samples of one pass.

    Attributes:
        samples: how many were seen.
        top1_count: the label has the largest logit.
        top5_count: the label is among the five largest logits, or among all when there are fewer.
        agreement_count: the largest logit is that of the teacher; None without a teacher.
        loss_sum: cross-entropy in nats, summed in fp64 over the samples with finite logits.
        nonfinite_count: samples with a NaN or infinite logit; they count as wrong.
    """

    samples: int
    top1_count: int
    top5_count: int
    agreement_count: int | None
    loss_sum: float
    nonfinite_count: int = 0

    @property
    def top1(self) -> float:
        """Share of samples in ``[0, 1]``."""
        return self.top1_count / self.samples

    @property
    def top5(self) -> float:
        """Share of samples in ``[0, 1]``."""
        return self.top5_count / self.samples

    @property
    def agreement(self) -> float | None:
        """Share of samples in ``[0, 1]``."""
        return None if self.agreement_count is None else self.agreement_count / self.samples

    @property
    def loss(self) -> float | None:
        """Mean cross-entropy in nats; None when no logits were finite."""
        finite = self.samples - self.nonfinite_count
        return self.loss_sum / finite if finite else None


def evaluate(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    teacher: nn.Module | None = None,
) -> Evaluation:
    """Run a model over labelled images; both models come back in the modes they had.

    Args:
        model: maps images to logits ``(B, C)``.
        batches: (images ``(B, C, H, W)`` floating, labels: B integers in ``[0, C)``, ...); images
            go to the device and dtype of each model's parameters.
        teacher: another model on the same device and classes, to agree with.

    Returns:
        The counts; they do not depend on how the samples are batched, up to the rounding of logits.

    Raises:
        InvalidInput: no samples, a batch or logits of another form, a label outside the classes, or
            another number of classes in the teacher.
    """
    samples = top1 = top5 = agreement = nonfinite = 0
    losses: list[float] = []
    with evaluating(model, teacher):
        for images, labels in checked("evaluate", batches, model, teacher):
            with torch.inference_mode():
                logits = model(as_input(model, images))
                other = teacher(as_input(teacher, images)) if teacher is not None else None
            check_logits("evaluate", logits, labels)
            if other is not None and other.shape != logits.shape:
                raise InvalidInput(
                    f"evaluate: teacher must give logits of shape {tuple(logits.shape)}, "
                    f"got {tuple(other.shape)}"
                )
            logits, labels = logits.float(), labels.to(logits.device)
            finite = logits.isfinite().all(1)
            ranked = _ranked(logits)[:, :5]
            hits = (ranked == labels[:, None]) & finite[:, None]
            samples += len(labels)
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            nonfinite += int((~finite).sum())
            losses += F.cross_entropy(logits[finite], labels[finite], reduction="none").tolist()
            if other is not None:
                other = other.float()
                both = finite & other.isfinite().all(1)
                agreement += int(((ranked[:, 0] == _ranked(other)[:, 0]) & both).sum())
    if samples == 0:
        raise InvalidInput("evaluate: batches must hold at least one sample, got none")
    return Evaluation(
        samples=samples,
        top1_count=top1,
        top5_count=top5,
        agreement_count=agreement if teacher is not None else None,
        # exact, so that another batch size gives the same sum
        loss_sum=math.fsum(losses),
        nonfinite_count=nonfinite,
    )


def _ranked(logits: torch.Tensor) -> torch.Tensor:
    """Classes by falling logit; equal ones by number, which ``topk`` and ``argmax`` leave open."""
    return logits.sort(dim=1, descending=True, stable=True).indices
