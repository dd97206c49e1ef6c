"""Hidden states, features and relations, and how tokens and blocks are brought together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vitprune_fast.distill import DistillConfig
from vitprune_fast.distill.losses._base import Comparison, Loss, Reads, Seen, mean_square
from vitprune_fast.distill.losses._tokens import align_tokens, block_pairs
from vitprune_fast.distill.losses.features import Features
from vitprune_fast.distill.losses.hidden import Hidden
from vitprune_fast.distill.losses.relation import qkv_relation
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_vit


def _states(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def _seen(states: list[Tensor], prefix: int = 0, features: Tensor | None = None) -> Seen:
    return Seen(torch.empty(0), {k: (x, prefix) for k, x in enumerate(states)}, {}, features)


def _compared(loss: Loss, student: Seen, teacher: Seen) -> tuple[Tensor, Any]:
    """The loss, with the projectors it wants."""
    both = Comparison(student, teacher, torch.Generator())
    maps: Any = loss.make_projectors(both)
    maps = None if maps is None else maps.double()
    return loss(replace(both, projectors=maps)), maps


def _hidden(pairs: int) -> Hidden:
    layers = tuple((k, k) for k in range(pairs))
    return Hidden(DistillConfig(layers=layers), random_vit(), random_vit())


def test_hidden_is_the_mean_over_pairs_of_means() -> None:
    students, teachers = _states(2, 3, 5, 4), _states(2, 3, 5, 4, seed=1)
    wanted = sum((s - t).square().mean() for s, t in zip(students, teachers, strict=True)) / 2
    got, maps = _compared(_hidden(2), _seen(students), _seen(teachers))
    assert torch.allclose(got, torch.as_tensor(wanted)) and maps is None


def test_projectors_meet_other_widths_and_learn() -> None:
    students = [x.requires_grad_() for x in _states(2, 3, 5, 4)]
    teachers = [*_states(1, 3, 6, 7, seed=1), *_states(1, 3, 6, 4, seed=2)]
    loss, maps = _compared(_hidden(2), _seen(students, 1), _seen(teachers, 2))
    # equal widths need no map
    assert sum(p.numel() for p in maps.parameters()) == 4 * 7 + 7
    first = (maps[0](students[0]) - teachers[0][:, 1:]).square().mean()
    second = (students[1] - teachers[1][:, 1:]).square().mean()
    assert torch.allclose(loss, (first + second) / 2)
    loss.backward()
    assert all(p.grad is not None for p in maps.parameters())
    assert all(x.grad is not None for x in students)


def test_features_are_a_mean_and_take_a_projector() -> None:
    (student,), (teacher,) = _states(1, 3, 4), _states(1, 3, 6, seed=1)
    loss = Features(DistillConfig(), random_vit(), random_vit())
    assert loss.reads() == (Reads(features=True), Reads(features=True))
    got, maps = _compared(loss, _seen([], 0, student), _seen([], 0, teacher))
    assert torch.allclose(got, (maps[0](student) - teacher).square().sum() / 18)


def test_equal_states_are_at_a_loss_and_gradient_of_exactly_0() -> None:
    (student,) = (x.requires_grad_() for x in _states(1, 3, 5, 4))
    teacher = student.detach().clone().requires_grad_()
    loss = mean_square(student, teacher)
    loss.backward()
    assert loss == 0 and teacher.grad is None
    assert student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_compared_in_fp32(dtype: torch.dtype) -> None:
    # squares that fp16 cannot hold
    student, teacher = torch.full((2, 3, 4), 1000.0).to(dtype), torch.zeros(2, 3, 4).to(dtype)
    assert mean_square(student, teacher) == 1e6


# tokens


@pytest.mark.parametrize(
    ("student_prefix", "teacher_prefix", "left"),
    [
        pytest.param(1, 0, (1, 0), id="CaiT-has-no-class-token"),
        pytest.param(0, 1, (0, 1), id="teacher-has-more"),
        pytest.param(2, 1, (1, 0), id="distillation-token"),
        pytest.param(1, 5, (0, 4), id="teacher-with-registers"),
        pytest.param(1, 1, (0, 0), id="equal"),
    ],
)
@pytest.mark.parametrize("patches", [196, 12])
def test_first_tokens_of_the_side_with_more_go(
    student_prefix, teacher_prefix, left, patches
) -> None:
    (student,) = _states(1, 2, student_prefix + patches, 3)
    (teacher,) = _states(1, 2, teacher_prefix + patches, 5)
    got = align_tokens(student, student_prefix, teacher, teacher_prefix)
    for x, one, dropped in zip((student, teacher), got, left, strict=True):
        assert torch.equal(one, x[:, dropped:])
        assert one.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("middle", [(), (3,)])
def test_a_finer_grid_has_neighbouring_patches_side_by_side(middle: tuple[int, ...]) -> None:
    side, width = 4, 3
    (coarse,), (fine,) = _states(1, 2, 1 + 4, *middle, 7), _states(1, 2, side**2, *middle, width)
    merged, plain = align_tokens(fine, 0, coarse, 1)
    again = align_tokens(coarse, 1, fine, 0)
    assert torch.equal(again[0], plain) and torch.equal(again[1], merged)
    assert torch.equal(plain, coarse[:, 1:])
    assert merged.shape == (2, 4, *middle, 4 * width)
    grid = fine.view(2, side, side, *middle, width)
    # patch (1, 0) of the coarse grid is made of rows 2, 3 and columns 0, 1
    wanted = [grid[:, row, column] for row in (2, 3) for column in (0, 1)]
    assert torch.equal(merged[:, 2], torch.cat(wanted, -1))


def test_tokens_and_states_that_do_not_fit_are_refused() -> None:
    (x,) = _states(1, 2, 10, 4)
    with pytest.raises(InvalidInput, match="got 4 and 9 patches after 1 and 1 prefix tokens"):
        align_tokens(x, 1, x[:, :5], 1)
    with pytest.raises(InvalidInput, match="got 8 and 10 patches after 2 and 0 prefix tokens"):
        align_tokens(x, 0, x, 2)
    with pytest.raises(InvalidInput, match=r"student must have shape \(2, 10, 3\) .* can make"):
        mean_square(x, x[..., :3])


# blocks


def test_blocks_are_mapped_evenly_or_at_both_ends() -> None:
    assert block_pairs((), 12, 12) == [(k, k) for k in range(12)]
    assert block_pairs((), 12, 24) == [(k, 2 * k + 1) for k in range(12)]
    assert block_pairs((), 3, 4) == [(0, 1), (1, 2), (2, 3)]
    assert block_pairs((), 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    # the published pairs of DeiT and CaiT-S24
    both = [(k, k) for k in range(4)], [(8 + k, 20 + k) for k in range(4)]
    assert block_pairs((), 12, 24, ends=4) == [*both[0], *both[1]]
    assert block_pairs((), 1, 24, ends=4) == [(0, 0), (0, 23)]


# relations


def test_qkv_relation_is_the_formula() -> None:
    (student,), (teacher,) = _states(1, 2, 5, 3, 2, 4), _states(1, 2, 5, 3, 3, 6, seed=1)
    terms = []
    for a in range(3):
        for b in range(3):
            logits = [
                torch.einsum("bnhk,bmhk->bnm", x[:, :, a], x[:, :, b]) / (x[0, 0, 0].numel() ** 0.5)
                for x in (student, teacher)
            ]
            terms.append(-(logits[1].softmax(2) * logits[0].log_softmax(2)).sum() / 10)
    assert torch.allclose(
        qkv_relation(student.flatten(3), teacher.flatten(3)), sum(terms) / torch.tensor(9.0)
    )


def test_qkv_relation_of_equal_layers_has_no_gradient_and_no_smaller_value() -> None:
    (teacher,) = _states(1, 2, 5, 3, 8)
    student = teacher.clone().requires_grad_()
    loss = qkv_relation(student, teacher)
    loss.backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-15
    assert qkv_relation(student.detach() + 0.1 * torch.randn_like(teacher), teacher) > loss
