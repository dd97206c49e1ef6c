"""Losses against their formulas, written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitprune_fast.distill.losses import cross_entropy, soft_kd

_SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 1000))


def _logits(shape: tuple[int, int, int], purpose: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2 * shape[2] + purpose)
    return 3 * torch.randn(shape[:2], generator=generator, dtype=torch.float64)


def _softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


@given(_SHAPES, st.floats(0.25, 20))
def test_soft_kd_is_the_formula(shape: tuple[int, int, int], temperature: float) -> None:
    student, teacher = _logits(shape, 0), _logits(shape, 1)
    wanted = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = _softmax(t, temperature), _softmax(s, temperature)
        wanted += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    wanted *= temperature**2 / shape[0]
    # the sum cancels where both are close
    assert soft_kd(student, teacher, temperature).item() == pytest.approx(
        wanted, rel=1e-9, abs=1e-10 * temperature**2
    )


@given(_SHAPES, st.floats(0.5, 20))
def test_soft_kd_gradient_does_not_depend_on_the_number_of_classes(
    shape: tuple[int, int, int], temperature: float
) -> None:
    student, teacher = _logits(shape, 0).requires_grad_(), _logits(shape, 1)
    soft_kd(student, teacher, temperature).backward()
    difference = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
    wanted = temperature * difference / shape[0]
    assert student.grad is not None
    assert torch.allclose(student.grad, wanted, rtol=1e-10, atol=1e-13 * temperature)


def test_soft_kd_sends_no_gradient_to_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    soft_kd(student, teacher, 2.0).backward()
    assert teacher.grad is None and student.grad is not None


def test_soft_kd_of_equal_logits_is_zero() -> None:
    logits = torch.randn(4, 10)
    assert soft_kd(logits, logits.clone(), 3.0).abs() < 1e-6


@given(_SHAPES, st.floats(0, 0.9))
def test_cross_entropy_is_the_formula(shape: tuple[int, int, int], smoothing: float) -> None:
    logits = _logits(shape, 0)
    labels = torch.arange(shape[0]) % shape[1]
    wanted = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        logs = [math.log(p) for p in _softmax(row, 1.0)]
        wanted -= (1 - smoothing) * logs[label] + smoothing * sum(logs) / len(logs)
    assert cross_entropy(logits, labels, smoothing).item() == pytest.approx(wanted / shape[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(4, 10).to(dtype), torch.randn(4, 10).to(dtype)
    for loss, wanted in [
        (soft_kd(student, teacher, 2.0), soft_kd(student.float(), teacher.float(), 2.0)),
        (
            cross_entropy(student, torch.zeros(4).long()),
            cross_entropy(student.float(), torch.zeros(4).long()),
        ),
    ]:
        assert loss.dtype == torch.float32 and torch.equal(loss, wanted)
