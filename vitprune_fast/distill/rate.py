"""The default peak learning rate, by how far a student is from what it learns.

A rate at which a broken student recovers breaks one that is nearly right. Adam moves every weight
by about its rate per step, at first in directions that are mostly noise; so a rate suits when such
steps change the student by no more than a share of what it has to learn, and no weight by more than
a share of its size, which bounds what a student that says nothing right yet may lose of what it
knows.
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

from vitprune_fast.batches import as_input, check_labels, check_logits, logits_of
from vitprune_fast.distill.hidden_states import pooled_of
from vitprune_fast.modules.modes import evaluating
from vitprune_fast.randomness import seeded

LARGEST = 1e-3
"""For a student that was never trained, and where no rule is known."""
LEAST = 1e-6
OF_REACH, OF_SIZE = 0.025, 0.008
"""Shares that a rate may be. A ViT-S/14 cut to half and swept (79.8 % on CIFAR-10, reach 8.4e-4)
came to 79.9 % in an epoch at 2e-5, and fell to 74.7 at 1e-4; cut to .3 (74.1 %, reach 5.7e-4) it
came to 76.2 at 2e-5, and fell to 72.6 at 5e-5. Cut to half and not swept (25.4 %, size 0.016) it
came to 69.6 at 1e-4, 34.6 at 5e-4 and 25.2 at 1e-3, where the digits' (size 0.1) is best."""
IMAGES = 128
"""Training images that are looked at."""
# a step after which no student is what it was, and one that rounding hides
_LARGEST_STEP, _LEAST_STEP = 1.0, 1e-7
# the change grows with the square of a small step, so that two would do
_ROUNDS = 3


GATES_GO = 4
"""How many times the way to its end a gate may go in a training."""


def gate_rate(way: float, steps: int) -> float:
    """Least peak rate at which gates get where they may have to go, however few the steps.

    Adam moves by about the rate per step, of which a cosine leaves half on average.

    Args:
        way: from where a gate starts to its end.
        steps: of the training.
    """
    return 2 * GATES_GO * way / steps


@dataclass(frozen=True)
class State:
    """How far a student is from what it learns, and how fast it would move there.

    Attributes:
        distance: nats per image, at least 0: divergence of the student from the teacher, or
            cross-entropy of the labels; NaN where there is nothing to compare.
        reach: size of a step of random sign of every weight that changes the student's outputs by
            as many nats; above 0.
        size: root mean square of the weights of its matrices; None for a student whose norms say
            that it was never trained.
    """

    distance: float
    reach: float
    size: float | None


def start_rate(state: State) -> float:
    """Peak learning rate of Adam for a student in this state, between LEAST and LARGEST.

    It does not fall as reach or size grow. Without a finite distance or reach, nothing but the size
    says what there is to lose.
    """
    if state.size is None:
        return LARGEST
    finite = math.isfinite(state.distance) and math.isfinite(state.reach)
    rate = min(OF_REACH * state.reach if finite else math.inf, OF_SIZE * state.size)
    return min(max(rate, LEAST), LARGEST) if math.isfinite(rate) else LARGEST


@torch.no_grad()
def state_of(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    seed: int,
    autocast: Callable[[], AbstractContextManager],
    features: bool = False,
) -> State:
    """Measure the state of a student, which is left as it was.

    Args:
        student: maps images to logits ``(B, C)``, or to features.
        teacher: as above; None learns from labels.
        batches: images ``(B, C, H, W)`` and labels ``(B,)``; those whose logits are not finite are
            left out.
        seed: of the step's signs. Same inputs, same bits.
        autocast: where the student computes.
        features: whether outputs are features, which stand for normal distributions of variance 1.
            Those of a student that has lost some cannot be compared: its distance is not finite.

    Raises:
        InvalidInput: labels to learn from have no class.
    """
    apart = _distances if features else _divergences
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
            if features:
                return [pooled_of(output).double() for output in outputs]
            found = [logits_of(output) for output in outputs]
            for logits, (_, labels) in zip(found, batches, strict=True):
                check_logits("distill", logits, torch.zeros_like(labels), student)
            return [logits.double().log_softmax(1) for logits in found]

        now = said(0.0)
        if teacher is None:
            for logits, (_, labels) in zip(now, batches, strict=True):
                check_labels("distill", labels, logits.shape[1])
            learnt = [
                F.cross_entropy(logits, labels.to(logits.device), reduction="none")
                for logits, (_, labels) in zip(now, batches, strict=True)
            ]
        else:
            taught = [teacher(as_input(teacher, images)) for images, _ in batches]
            if features:
                wanted = [pooled_of(each).to(now[0]) for each in taught]
            else:
                wanted = [logits_of(each).to(now[0]).log_softmax(1) for each in taught]
            if wanted[0].shape != now[0].shape:
                return State(math.nan, math.nan, size_of(student))
            learnt = apart(wanted, now)
        distance = _mean(learnt)
        # rounding may take a divergence of next to nothing below zero; NaN stays
        distance = 0.0 if distance < 0 else distance
        reach = LARGEST
        for _ in range(_ROUNDS):
            changed = _mean(apart(now, said(reach)))
            # without a finite output left: shorter
            factor = 0.1 if math.isnan(changed) else math.sqrt(distance / max(changed, 1e-30))
            reach = min(max(reach * factor, _LEAST_STEP), _LARGEST_STEP)
    return State(distance, reach, size_of(student))


@torch.no_grad()
def size_of(student: nn.Module) -> float | None:
    """``State.size`` of a student."""
    scales = [p for n, p in student.named_parameters() if n.endswith("weight") and p.ndim == 1]
    if scales and all((scale == 1).all() for scale in scales):
        return None
    squares = [(p.double().square().sum(), p.numel()) for p in student.parameters() if p.ndim > 1]
    total = sum(number for _, number in squares)
    return math.sqrt(sum(float(square) for square, _ in squares) / total) if total else None


def _divergences(ours: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Of others from ours, nats per image."""
    return [(p.exp() * (p - q)).sum(1) for p, q in zip(ours, others, strict=True)]


def _distances(ours: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The same of normal distributions of variance 1 with these means."""
    return [(p - q).square().sum(1) / 2 for p, q in zip(ours, others, strict=True)]


def _mean(parts: list[Tensor]) -> float:
    """Of the finite ones; NaN without any."""
    together = torch.cat([part.cpu() for part in parts])
    return together[together.isfinite()].mean().item()
