"""Manifold losses against the matrices they are defined by; B images, N tokens, D and E widths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from error_budget import assert_within_budget
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.registration import opcheck
from vitprune_fast.distill import DistillConfig
from vitprune_fast.distill.losses._base import Comparison, Seen
from vitprune_fast.distill.losses.manifold import (
    Manifold,
    manifold_inter,
    manifold_intra,
    manifold_random,
)
from vitprune_fast.distill.losses.manifold_full import manifold_full
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_vit

Loss = Callable[[Tensor, Tensor], Tensor]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _states(batch: int, tokens: int, width: int, teacher_width: int, dtype=torch.float64):
    generator = _generator(1)
    student = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    teacher = torch.randn(batch, tokens, teacher_width, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def _direct(student: Tensor, teacher: Tensor) -> Tensor:
    """Over the rows of the last two dimensions, all similarities at once."""
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (t @ t.mT - s @ s.mT).square().mean()


def _random(student: Tensor, teacher: Tensor) -> Tensor:
    return manifold_random(student, teacher, _generator(), 7)


def _drawn(student: Tensor, teacher: Tensor) -> Tensor:
    rows = torch.randperm(student.shape[0] * student.shape[1], generator=_generator())[:7]
    return _direct(student.flatten(0, 1)[rows], teacher.flatten(0, 1)[rows])


PAIRS = [
    pytest.param(manifold_intra, _direct, id="intra"),
    pytest.param(
        manifold_inter,
        lambda s, t: _direct(s.transpose(0, 1), t.transpose(0, 1)),
        id="inter",
    ),
    pytest.param(_random, _drawn, id="random"),
    pytest.param(manifold_full, lambda s, t: _direct(s.flatten(0, 1), t.flatten(0, 1)), id="full"),
]
LOSSES = [pytest.param(pair.values[0], id=pair.id) for pair in PAIRS]


def _value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize(("loss", "definition"), PAIRS)
@pytest.mark.parametrize(("width", "teacher_width"), [(6, 10), (10, 6), (8, 8)])
def test_losses_are_their_definitions(loss, definition, width, teacher_width) -> None:
    student, teacher = _states(3, 5, width, teacher_width)
    got = _value_and_gradient(loss, student, teacher)
    wanted = _value_and_gradient(definition, student, teacher)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("width", [24, 32])
def test_full_equals_the_direct_form_to_1e_5_in_fp32(width) -> None:
    """Also where the student is so near the teacher that the terms of the sum nearly cancel."""
    student, teacher = _states(8, 49, width, 32, torch.float32)
    cases = [student]
    if width == 32:
        noise = torch.randn(student.shape, generator=_generator(2))
        cases.append((teacher + 1e-3 * noise).requires_grad_())
    for near in cases:
        got = _value_and_gradient(manifold_full, near, teacher)
        exact = near.detach().double().requires_grad_()
        flat = teacher.double().flatten(0, 1)
        wanted = _value_and_gradient(lambda s, t: _direct(s.flatten(0, 1), t), exact, flat)
        assert got[0].double().item() == pytest.approx(wanted[0].item(), rel=1e-5)
        plain = _value_and_gradient(
            lambda s, t: _direct(s.flatten(0, 1), t), near, teacher.flatten(0, 1)
        )
        # what 1e-3 of a row of length 1 has left of the digits of fp32
        assert_within_budget(got[1], plain[1], wanted[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equal_states_are_at_a_loss_and_gradient_of_exactly_0(loss, dtype) -> None:
    student, _ = _states(4, 17, 24, 24, dtype)
    value, gradient = _value_and_gradient(loss, student, student.detach().clone())
    assert value == 0
    assert not gradient.any()


def test_equal_similarities_in_another_width_are_near_0() -> None:
    student, _ = _states(4, 50, 24, 24, torch.float32)
    turn, _ = torch.linalg.qr(torch.randn(40, 24, generator=_generator(), dtype=torch.float64))
    turned = (student.detach().double() @ turn.T).float()
    value, gradient = _value_and_gradient(manifold_full, student, turned)
    plain, plain_gradient = _value_and_gradient(manifold_full, student, torch.randn(4, 50, 40))
    assert 0 <= value < 1e-7 * plain
    assert gradient.abs().max() < 1e-4 * plain_gradient.abs().max()


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_without_a_direction_have_no_gradient_and_spoil_none(loss) -> None:
    student, teacher = _states(3, 5, 6, 10, torch.float32)
    student = student.detach().clone()
    student[:, 2], teacher[1, 3] = 0, 0
    value, gradient = _value_and_gradient(loss, student.requires_grad_(), teacher)
    assert value.isfinite() and gradient.isfinite().all()
    assert not gradient[:, 2].any() and gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_fp32(loss, dtype) -> None:
    """Under autocast too; and a gradient in fp16 is not 0 before a loss scale comes to it."""
    student, teacher = _states(8, 49, 24, 32, dtype)
    scale = 2.0**20
    wide = student.detach().float().requires_grad_()
    wanted = _value_and_gradient(lambda s, t: scale * loss(s, t), wide, teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = _value_and_gradient(lambda s, t: scale * loss(s, t), student, teacher)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    assert torch.equal(got[0], wanted[0])
    assert_within_budget(got[1], wanted[1].to(dtype), wanted[1].double())


def _manifold(students: list[Tensor], teachers: list[Tensor], generator: torch.Generator) -> Tensor:
    config = DistillConfig(manifold_rows=7, layers=tuple((k, k) for k in range(len(students))))
    student, teacher = (
        Seen(torch.empty(0), {k: (x, 0) for k, x in enumerate(states)})
        for states in (students, teachers)
    )
    return Manifold(config, random_vit(), random_vit())(Comparison(student, teacher, generator))


def test_published_sum_over_pairs() -> None:
    students = [_states(3, 5, 6, 10)[0], _states(3, 5, 6, 10)[0] + 1]
    teachers = [_states(3, 5, 6, 10)[1], _states(3, 5, 6, 8)[1]]
    ours, theirs = _generator(), _generator()
    got = _manifold(students, teachers, ours)
    wanted = torch.zeros((), dtype=torch.float64)
    for s, t in zip(students, teachers, strict=True):
        # a new draw for each pair
        rows = torch.randperm(15, generator=theirs)[:7]
        wanted += 4 * _direct(s, t) + 0.1 * _direct(s.transpose(0, 1), t.transpose(0, 1))
        wanted += 0.2 * _direct(s.flatten(0, 1)[rows], t.flatten(0, 1)[rows])
    assert torch.allclose(got, wanted / 2, rtol=1e-12)
    assert not torch.equal(_manifold(students, teachers, ours), got)


def test_a_batch_of_one_image_has_no_inter_image_term() -> None:
    student, teacher = _states(1, 5, 6, 10)
    with pytest.raises(InvalidInput, match=r"have at least 2 images, as one is .*, got 1"):
        manifold_inter(student, teacher)
    # of 5 rows no more than 5 are drawn, which are all of the image's
    wanted = 4.2 * manifold_intra(student, teacher)
    assert torch.allclose(_manifold([student], [teacher], _generator()), wanted, rtol=1e-12)


class _Largest(TorchDispatchMode):
    """The largest number of elements among all results."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_matrix_of_all_similarities_is_made() -> None:
    """Seen from inside, with the plain functions that the registered ops run."""
    from vitprune_fast.distill.losses import manifold_full as gram
    from vitprune_fast.reference.manifold_loss import set_by_set

    student, teacher = (x.detach() for x in _states(24, 200, 6, 10))
    with _Largest() as largest:
        loss, *kept = gram._full.form(student, teacher)
        gram._full_backward.form(torch.ones_like(loss), student, teacher, *kept)
        set_by_set(student, teacher, torch.empty_like(student))
    # no more than a few images' own
    assert largest.elements == 2**18 // 200**2 * 200**2 < (24 * 200) ** 2 / 90


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_the_same_bits_again(loss) -> None:
    student, teacher = _states(4, 17, 24, 32, torch.float32)
    first = _value_and_gradient(loss, student, teacher)
    again = _value_and_gradient(loss, student, teacher)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_full_is_an_honest_op() -> None:
    student, teacher = _states(3, 5, 6, 10, torch.float32)
    opcheck(torch.ops.vitprune_fast.manifold_full.default, (student, teacher))
    compiled = torch.compile(manifold_full, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        _value_and_gradient(compiled, student, teacher),
        _value_and_gradient(manifold_full, student, teacher),
        strict=True,
    ):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="manifold_full: create_graph must be False"):
        torch.autograd.grad(manifold_full(student, teacher), student, create_graph=True)
