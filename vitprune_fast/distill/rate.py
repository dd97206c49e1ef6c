"""The peak learning rate that suits a student as it is, where nobody gives one.

A rate at which a broken student recovers breaks one that is nearly right. Adam moves every weight
by about its rate per step, at first in directions that are mostly noise; so a rate suits when such
steps change the student by no more than a share of what it has to learn, and the weights by no more
than a share of what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vitprune_fast.batches import as_input
from vitprune_fast.modes import evaluating
from vitprune_fast.randomness import seeded

LARGEST = 1e-3
"""For a student that has everything to learn, and where no rule is known."""
LEAST = 1e-5
SHARE = 0.025
"""Of the reach of a student. A ViT-S/14 cut to half and swept (79.8 % on CIFAR-10, reach 8.4e-4)
came to 79.9 % in an epoch at 2e-5, and fell to 74.7 at 1e-4; cut to .3 (74.1 %, reach 5.7e-4) it
came to 76.2 at 2e-5, and fell to 72.6 at 5e-5."""
WEIGHT_SHARE = 0.008
"""Of the root mean square of the weights. The same model cut without the sweep (reach 0.04, weights
of 0.016) came to 69.6 % at 1e-4, 34.6 at 5e-4 and 25.2 at 1e-3; the digits' (weights of 0.1) is
best at 1e-3."""
IMAGES = 256
"""Training images that are looked at."""
# a step after which no student is what it was, and one that rounding hides
_LARGEST_STEP, _LEAST_STEP = 1.0, 1e-7
# the change grows with the square of a small step, so that two would do
_ROUNDS = 4


@dataclass(frozen=True)
class State:
    """How far a student is from what it learns, and how fast it would move there.

    Attributes:
        distance: nats per image, at least 0: divergence of the student from the teacher, or
            cross-entropy of the labels.
        reach: size of a step of random sign of every weight that changes the student's outputs by
            as many nats; above 0.
        size: root mean square of the entries of its matrices that learn; infinite without any.
    """

    distance: float
    reach: float
    size: float


def start_rate(state: State) -> float:
    """Peak learning rate of Adam for a student in this state, between LEAST and LARGEST.

    It does not fall as the reach or the weights grow. A student whose distance or reach is not
    finite is broken: only its weights say how far it may go.
    """
    found = WEIGHT_SHARE * state.size
    if math.isfinite(state.distance) and math.isfinite(state.reach):
        found = min(found, SHARE * state.reach)
    return min(max(found, LEAST), LARGEST)


@torch.no_grad()
def state_of(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    seed: int,
    autocast: Callable[[], AbstractContextManager],
) -> State:
    """Measure the state of a student, which is left as it was.

    Args:
        student: maps images to logits ``(B, C)``.
        teacher: likewise; None learns from labels.
        batches: images ``(B, C, H, W)`` and labels ``(B,)``; those whose logits are not finite are
            left out.
        seed: of the step's signs. Same inputs, same bits.
        autocast: where the student computes.
    """
    with evaluating(student, teacher), seeded(seed, "rate"):
        named = {n: p for n, p in student.named_parameters() if p.requires_grad}
        signs = {n: torch.randn(p.shape).sign().to(p) for n, p in named.items()}

        def said(step: float) -> list[Tensor]:
            moved = {n: torch.add(p, signs[n], alpha=step) for n, p in named.items()}
            with autocast():
                outputs = [
                    functional_call(student, moved, (as_input(student, images),))
                    for images, _ in batches
                ]
            return [logits.double().log_softmax(1) for logits in outputs]

        now = said(0.0)
        if teacher is None:
            learnt = [
                F.cross_entropy(logits, labels.to(logits.device), reduction="none")
                for logits, (_, labels) in zip(now, batches, strict=True)
            ]
        else:
            taught = [teacher(as_input(teacher, images)) for images, _ in batches]
            learnt = _divergences([t.to(now[0]).log_softmax(1) for t in taught], now)
        distance = _mean(learnt)
        reach = LARGEST
        for _ in range(_ROUNDS):
            changed = _mean(_divergences(now, said(reach)))
            # without a finite output left: shorter
            factor = 0.1 if math.isnan(changed) else math.sqrt(distance / max(changed, 1e-30))
            reach = min(max(reach * factor, _LEAST_STEP), _LARGEST_STEP)
    squares = [p.double().square().mean() for p in named.values() if p.ndim > 1]
    counts = [p.numel() for p in named.values() if p.ndim > 1]
    total = sum(count * float(square) for count, square in zip(counts, squares, strict=True))
    return State(distance, reach, math.sqrt(total / sum(counts)) if total > 0 else math.inf)


def _divergences(ours: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Of others from ours, nats per image."""
    return [(p.exp() * (p - q)).sum(1) for p, q in zip(ours, others, strict=True)]


def _mean(parts: list[Tensor]) -> float:
    """Of the finite ones; NaN without any."""
    together = torch.cat([part.cpu() for part in parts])
    return together[together.isfinite()].mean().item()
