"""Losses of labels and on logits against their formulas, written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.loss import BinaryCrossEntropy

from vitprune_fast.distill.labels import binary_cross_entropy, cross_entropy
from vitprune_fast.distill.losses.hard import hard_kd
from vitprune_fast.distill.losses.soft import Reduction, soft_kd
from vitprune_fast.distill.losses.soft_sigmoid import sigmoid_kd
from vitprune_fast.errors import InvalidInput

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


@given(_SHAPES, st.floats(0.5, 20))
def test_sigmoid_kd_is_the_formula_and_so_is_its_gradient(
    shape: tuple[int, int, int], temperature: float
) -> None:
    student, teacher = _logits(shape, 0).requires_grad_(), _logits(shape, 1)
    found = sigmoid_kd(student, teacher, temperature)
    p, q = (teacher / temperature).sigmoid(), (student.detach() / temperature).sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    wanted = temperature**2 * each.mean()
    # the sum cancels where both are close
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-9, atol=1e-10 * temperature**2)
    found.backward()
    assert student.grad is not None
    torch.testing.assert_close(
        student.grad, temperature * (q - p) / p.numel(), rtol=1e-9, atol=1e-13 * temperature
    )


def test_sigmoid_kd_is_finite_where_a_class_is_certain() -> None:
    student = torch.tensor([[200.0, -200.0]], requires_grad=True)
    found = sigmoid_kd(student, torch.tensor([[-200.0, 200.0]]))
    found.backward()
    assert found.item() == pytest.approx(200.0) and student.grad is not None
    assert torch.allclose(student.grad, torch.tensor([[0.5, -0.5]]))


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


def test_forms_of_soft_kd_differ_by_what_they_divide_by() -> None:
    student, teacher = _logits((4, 7, 0), 0), _logits((4, 7, 0), 1)
    plain = soft_kd(student, teacher, 3.0)
    forms: dict[Reduction, torch.Tensor] = {
        "numel": plain / 7,
        # UP-ViT: a sum over the batch
        "sum": plain * 4,
    }
    for reduction, wanted in forms.items():
        got = soft_kd(student, teacher, 3.0, reduction=reduction)
        assert got.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_soft_kd_of_equal_logits_has_no_gradient() -> None:
    student = torch.randn(4, 10, requires_grad=True)
    soft_kd(student, student.detach().clone(), 3.0).backward()
    assert student.grad is not None
    # softmax sums to 1 but for rounding
    assert student.grad.abs().max() < 1e-7


def test_shares_of_one_class_are_its_number() -> None:
    logits, labels = _logits((5, 7, 3), 0), torch.tensor([0, 6, 3, 3, 1])
    shares = torch.nn.functional.one_hot(labels, 7)
    for smoothing in (0.0, 0.1):
        wanted = cross_entropy(logits, labels, smoothing)
        # fp32 shares and fp64 logits
        assert torch.allclose(cross_entropy(logits, shares.float(), smoothing), wanted, rtol=1e-12)
    mixed = 0.3 * shares + 0.7 * shares.flip(0)
    wanted = 0.3 * cross_entropy(logits, labels) + 0.7 * cross_entropy(logits, labels.flip(0))
    assert torch.allclose(cross_entropy(logits, mixed.double()), wanted, rtol=1e-6)


def test_the_teachers_hard_label_is_its_likeliest_class() -> None:
    student, teacher = _logits((5, 7, 3), 0), _logits((5, 7, 3), 1)
    assert torch.equal(hard_kd(student, teacher), cross_entropy(student, teacher.argmax(1)))


@given(_SHAPES, st.floats(0, 0.9))
def test_binary_cross_entropy_is_the_formula(shape: tuple[int, int, int], smoothing: float) -> None:
    logits, labels = _logits(shape, 0), torch.arange(shape[0]) % shape[1]
    wanted = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for number, logit in enumerate(row):
            share = (1 - smoothing) * (number == label) + smoothing / len(row)
            p = 1 / (1 + math.exp(-logit))
            wanted -= share * math.log(p) + (1 - share) * math.log(1 - p)
    got = binary_cross_entropy(logits, labels, smoothing).item()
    assert got == pytest.approx(wanted / logits.numel(), rel=1e-9)


def test_binary_cross_entropy_is_timm_s_with_and_without_a_threshold() -> None:
    logits, labels = _logits((4, 7, 3), 0).float(), torch.tensor([0, 6, 3, 3])
    shares = torch.nn.functional.one_hot(labels, 7).float()
    mixed = 0.15 * shares + 0.85 * shares.flip(0)
    for threshold in (None, 0.0, 0.2):
        peer = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)
        for target in (labels, mixed):
            got = binary_cross_entropy(logits, target, 0.0, threshold)
            torch.testing.assert_close(got, peer(logits, target))
    # a share of 0.15 counts whole above 0, and not at all above 0.2
    assert binary_cross_entropy(logits, mixed, 0, 0.2) != binary_cross_entropy(logits, mixed, 0, 0)


def test_wrong_arguments_are_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(
        InvalidInput, match=r"soft_kd: teacher_BC must have shape \(2, 3\) .* classes"
    ):
        soft_kd(x, torch.ones(2, 4))
    with pytest.raises(InvalidInput, match="hard_kd: teacher_BC must have shape"):
        hard_kd(x, torch.ones(2, 1))
    with pytest.raises(InvalidInput, match=r"labels must be \(2,\) int64 or .*, got \(3,\) int64"):
        cross_entropy(x, torch.zeros(3).long())
    with pytest.raises(InvalidInput, match=r"labels must be .*, got \(2,\) float32"):
        cross_entropy(x, torch.zeros(2))
    with pytest.raises(
        InvalidInput, match=r"binary_cross_entropy: labels must be .*, got \(2, 2\)"
    ):
        binary_cross_entropy(x, x[:, :2])
