"""From scores to gates: the functions behind each kind of gate. U units of one axis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..randomness import generator

KINDS = ("l1", "ste", "hard_concrete", "fixed")
# Louizos et al. 2018, section 4: temperature, and the interval that the gate is stretched to
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
# what a score starts as: a gate that is 1, exactly, in evaluation
INITIAL_SCORE = {"l1": 1.0, "ste": 1.0, "hard_concrete": 2.5, "fixed": 1.0}
# how far a score goes until its gate is closed, and a threshold until half of its axis is
WAY = {"l1": 1.0, "ste": 1.0, "hard_concrete": 4.0, "fixed": 0.0}
WAY_OF_THRESHOLD = 10.0
# nats for the whole model's multiply-accumulates, by which gates fall against what they are worth
WAY_OF_MULTIPLIER = 6.0
# sigmoid(10) of the units stay: all of any axis below 22,000 units
INITIAL_THRESHOLD = 10.0
# logistic noise of a draw nearer to 0 or 1 would not be finite
_NEAREST = 1e-6


def at_least(score_U: Tensor, threshold: Tensor) -> Tensor:
    """``1[score >= threshold]``; the gradient passes to the score as if the step were the identity.

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013
    (arXiv:1308.3432), the straight-through estimator.
    """
    return _Step.apply(score_U, threshold)  # pyright: ignore[reportReturnType]


def top_share(score_U: Tensor, threshold: Tensor, multiple: int = 1) -> Tensor:
    """The ``ceil(sigmoid(threshold) U)`` best units as 1 and the others as 0.

    Reference: Yu et al., "Width & Depth Pruning for Vision Transformers", AAAI 2022. The gradient
    passes to the scores unchanged; the threshold gets ``sum_u gradient_u * gate_u``.

    Args:
        score_U: larger means keep; of equal ones the lower unit numbers stay.
        threshold: 0-dimensional.
        multiple: the count is rounded to the nearest multiple of this, one multiple at least; an
            axis with fewer units is kept whole.
    """
    return _TopShare.apply(score_U, threshold, multiple)  # pyright: ignore[reportReturnType]


def headroom(score_U: Tensor, threshold: Tensor) -> Tensor:
    """How far the threshold of :func:`top_share` may fall until a unit goes, (U,), to half a unit.

    Below 0 for units that are gone. Larger scores have more, and of equal ones the lower numbers.
    """
    share = (_ranks(score_U) + 0.5) / len(score_U)
    return threshold - torch.logit(share)


def hard_concrete(log_alpha_U: Tensor, noise_U: Tensor | None = None) -> Tensor:
    """Gates in [0, 1], with both ends reached: a stretched and cut concrete variable.

    Reference: Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", ICLR
    2018 (arXiv:1712.01312), eq. 10 to 13.

    Args:
        log_alpha_U: location of each gate.
        noise_U: one draw of :func:`logistic_noise` for a gate at random; None for the gate of
            evaluation.
    """
    if noise_U is not None:
        log_alpha_U = (log_alpha_U + noise_U) / TEMPERATURE
    return (torch.sigmoid(log_alpha_U) * (HIGH - LOW) + LOW).clamp(0, 1)


def probability_open(log_alpha_U: Tensor) -> Tensor:
    """P(gate != 0) of a hard concrete gate (eq. 12): the L0 norm that is to be expected."""
    return torch.sigmoid(log_alpha_U - TEMPERATURE * math.log(-LOW / HIGH))


def logistic_noise(size: int, seed: int, draw: int, axis: str) -> Tensor:
    """``log u - log(1 - u)`` for uniform u, (size,) fp64 on the CPU; (seed, draw, axis) fix it."""
    source = generator(seed, "gates", draw, axis)
    uniform = torch.rand(size, generator=source, dtype=torch.float64)
    return torch.logit(uniform, eps=_NEAREST)


def _ranks(score_U: Tensor) -> Tensor:
    """How many units are better, (U,) int64; of equal ones the lower numbers are."""
    return score_U.argsort(descending=True, stable=True).argsort()


def saturated(score_U: Tensor) -> Tensor:
    """``min(|score|, 1)``, with the gradient of ``|score|`` also above 1."""
    magnitude = score_U.abs()
    return _Step.apply(magnitude, None)  # pyright: ignore[reportReturnType]


class _Step(torch.autograd.Function):
    """Forward a function that is flat somewhere, backward the identity."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, threshold: Tensor | None) -> Tensor:
        if threshold is None:
            return score.clamp(max=1)
        # a score that is not a number makes no decision, and must be seen
        return (score >= threshold).to(score.dtype).where(~score.isnan(), score)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _TopShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: Tensor, threshold: Tensor, multiple: int) -> Tensor:
        size = len(score)
        count = torch.ceil(torch.sigmoid(threshold) * size)
        if multiple > 1:
            count = (torch.round(count / multiple) * multiple).clamp(min=multiple)
        gate = (_ranks(score) < count).to(score.dtype).where(~score.isnan(), score)
        ctx.save_for_backward(gate)
        return gate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gate,) = ctx.saved_tensors
        return grads[0], (grads[0] * gate).sum(), None
