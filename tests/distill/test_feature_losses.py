"""Hidden states, features and relations, and how tokens and blocks are brought together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitprune_fast.distill.losses import (
    Projectors,
    align_tokens,
    feature_mse,
    hidden_mse,
    map_blocks,
    qkv_relation,
)
from vitprune_fast.errors import InvalidInput


def _states(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_hidden_mse_is_the_mean_over_pairs_of_means() -> None:
    students, teachers = _states(2, 3, 5, 4), _states(2, 3, 5, 4, seed=1)
    wanted = sum((s - t).square().mean() for s, t in zip(students, teachers, strict=True)) / 2
    assert torch.allclose(hidden_mse(students, teachers), torch.as_tensor(wanted))


def test_projectors_meet_other_widths_and_learn() -> None:
    students = [x.requires_grad_() for x in _states(2, 3, 5, 4)]
    teachers = [*_states(1, 3, 6, 7, seed=1), *_states(1, 3, 6, 4, seed=2)]
    projectors = Projectors([4, 4], [7, 4]).double()
    # equal widths need no map
    assert sum(p.numel() for p in projectors.parameters()) == 4 * 7 + 7
    loss = hidden_mse(students, teachers, projectors, student_prefix=1, teacher_prefix=2)
    first = (projectors.maps[0](students[0]) - teachers[0][:, 1:]).square().mean()
    second = (students[1] - teachers[1][:, 1:]).square().mean()
    assert torch.allclose(loss, (first + second) / 2)
    loss.backward()
    assert all(p.grad is not None for p in projectors.parameters())
    assert all(x.grad is not None for x in students)
    projected = projectors([x.detach() for x in students])
    assert [x.shape[2] for x in projected] == [7, 4]


def test_feature_mse_is_a_mean_and_takes_a_projector() -> None:
    (student,), (teacher,) = _states(1, 3, 4), _states(1, 3, 6, seed=1)
    projector = torch.nn.Linear(4, 6, dtype=torch.float64)
    wanted = (projector(student) - teacher).square().sum() / 18
    assert torch.allclose(feature_mse(student, teacher, projector), wanted)


def test_equal_states_are_at_a_loss_and_gradient_of_exactly_0() -> None:
    students = [x.requires_grad_() for x in _states(2, 3, 5, 4)]
    loss = hidden_mse(students, [x.detach().clone() for x in students])
    loss = loss + feature_mse(students[0][:, 0], students[0][:, 0].detach().clone())
    loss.backward()
    assert loss == 0
    assert all(x.grad is not None and not x.grad.any() for x in students)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_compared_in_fp32(dtype: torch.dtype) -> None:
    # squares that fp16 cannot hold
    student, teacher = torch.full((2, 3, 4), 1000.0).to(dtype), torch.zeros(2, 3, 4).to(dtype)
    assert hidden_mse([student], [teacher]) == 1e6
    assert feature_mse(student[:, 0], teacher[:, 0]) == 1e6


# tokens


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "left"),
    [
        pytest.param(197, 196, (1, 0), id="CaiT-has-no-class-token"),
        pytest.param(196, 197, (0, 1), id="teacher-has-more"),
        pytest.param(198, 197, (1, 0), id="distillation-token"),
        pytest.param(197, 201, (0, 4), id="teacher-with-registers"),
        pytest.param(17, 17, (0, 0), id="equal"),
    ],
)
def test_first_tokens_of_the_side_with_more_go(num_student, num_teacher, left) -> None:
    (student,), (teacher,) = _states(1, 2, num_student, 3), _states(1, 2, num_teacher, 5)
    got = align_tokens(student, teacher)
    for x, one, dropped in zip((student, teacher), got, left, strict=True):
        assert torch.equal(one, x[:, dropped:])
        assert one.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_a_finer_grid_has_neighbouring_patches_side_by_side() -> None:
    side, width = 4, 3
    (student,), (teacher,) = _states(1, 2, 1 + 4, 7), _states(1, 2, side * side, width)
    for one, other, fine, coarse in (
        (*align_tokens(student, teacher), 1, 0),
        (*align_tokens(teacher, student), 0, 1),
    ):
        merged, plain = (one, other)[fine], (one, other)[coarse]
        assert torch.equal(plain, student[:, 1:])
        assert merged.shape == (2, 4, 4 * width)
        grid = teacher.view(2, side, side, width)
        # patch (1, 0) of the coarse grid is made of rows 2, 3 and columns 0, 1
        wanted = [grid[:, row, column] for row in (2, 3) for column in (0, 1)]
        assert torch.equal(merged[:, 2], torch.cat(wanted, 1))


def test_grids_that_are_not_square_need_prefixes() -> None:
    (student,), (teacher,) = _states(1, 2, 2 + 12, 3), _states(1, 2, 1 + 12, 3)
    one, other = align_tokens(student, teacher, student_prefix=2, teacher_prefix=1)
    assert torch.equal(one, student[:, 1:]) and torch.equal(other, teacher)
    with pytest.raises(InvalidInput, match="got 12 and 14 patches after 1 and 0 prefix tokens"):
        align_tokens(student, teacher, student_prefix=0, teacher_prefix=1)


def test_tokens_and_states_that_do_not_fit_are_refused() -> None:
    (x,) = _states(1, 2, 10, 4)
    with pytest.raises(InvalidInput, match="hidden_mse: teacher_BNE must have the grid of student"):
        hidden_mse([x], [x[:, :5]])
    with pytest.raises(
        InvalidInput, match="teacher_BNE must have 2 images like student_BND, got 1"
    ):
        align_tokens(x, x[:1])
    with pytest.raises(InvalidInput, match="student_prefix must be from 0 to 9, got 10"):
        align_tokens(x, x, student_prefix=10)
    with pytest.raises(
        InvalidInput, match=r"students\[0\] must have shape \(2, 10, 3\) .* can make"
    ):
        hidden_mse([x], [x[..., :3]])
    with pytest.raises(InvalidInput, match="teachers must hold 2 states like students, got 1"):
        hidden_mse([x, x], [x])
    with pytest.raises(InvalidInput, match="students must hold at least one state"):
        hidden_mse([], [])
    with pytest.raises(InvalidInput, match="projectors must have 1 maps"):
        hidden_mse([x], [x], Projectors([4, 4], [4, 4]))
    with pytest.raises(InvalidInput, match="teacher_widths must be 2 widths"):
        Projectors([4, 4], [4])


# blocks


def test_blocks_are_mapped_evenly_or_by_what_was_kept() -> None:
    assert map_blocks(12, 12) == [(k, k) for k in range(12)]
    assert map_blocks(12, 24) == [(k, 2 * k + 1) for k in range(12)]
    assert map_blocks(3, 4) == [(0, 1), (1, 2), (2, 3)]
    assert map_blocks(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    # block 2 answers for the dropped 3 and 4 too, the last for all that follow
    assert map_blocks(4, 8, kept=[0, 1, 2, 5]) == [(0, 0), (1, 1), (2, 4), (3, 7)]
    assert map_blocks(12, 24, pairs=[(8, 20), (0, 0)]) == [(0, 0), (8, 20)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kept": [0, 2]}, "kept must be 3 ascending numbers from 0 to 5"),
        ({"kept": [0, 2, 2]}, "kept must be 3 ascending"),
        ({"kept": [0, 2, 6]}, "kept must be 3 ascending"),
        ({"pairs": [(0, 6)]}, "pairs must be pairs of blocks below 3 and 6"),
        ({"pairs": []}, r"pairs must be .* at least one, got \[\]"),
        ({"kept": [0, 1, 2], "pairs": [(0, 0)]}, "pairs must be None where kept is given"),
    ],
)
def test_blocks_that_are_not_there_are_refused(arguments, sentence) -> None:
    with pytest.raises(InvalidInput, match=f"map_blocks: {sentence}"):
        map_blocks(3, 6, **arguments)


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
    assert torch.allclose(qkv_relation(student, teacher), sum(terms) / torch.tensor(9.0))
    wanted = (terms[0] + terms[4] + terms[8]) / 3
    assert torch.allclose(qkv_relation(student, teacher, "same"), wanted)


def test_qkv_relation_of_equal_layers_has_no_gradient_and_no_smaller_value() -> None:
    (teacher,) = _states(1, 2, 5, 3, 2, 4)
    student = teacher.clone().requires_grad_()
    loss = qkv_relation(student, teacher)
    loss.backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-15
    assert qkv_relation(student.detach() + 0.1 * torch.randn_like(teacher), teacher) > loss
    # the class token of the side that has one more goes
    assert torch.equal(
        qkv_relation(teacher, teacher[:, 1:]), qkv_relation(teacher[:, 1:], teacher[:, 1:])
    )


def test_qkv_relation_refuses_wrong_arguments() -> None:
    (x,) = _states(1, 2, 5, 3, 2, 4)
    with pytest.raises(InvalidInput, match="student_BN3HK must have 3 parts, q, k and v, got 2"):
        qkv_relation(x[:, :, :2], x)
    with pytest.raises(InvalidInput, match="relations must be 'all' or 'same', got 'qk'"):
        qkv_relation(x, x, "qk")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="teacher_BN3HK must have 5 dimensions"):
        qkv_relation(x, x[0])
