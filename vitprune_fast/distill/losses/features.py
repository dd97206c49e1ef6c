"""Losses on hidden states and features, compared number by number; they need equal widths.

B images, N tokens, D width of the student, E width of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune_fast._checks import require
from vitprune_fast.distill.losses.precision import wide
from vitprune_fast.distill.losses.tokens import align_tokens


class Projectors(nn.Module):
    """One linear map from the student's to the teacher's width for each compared pair.

    Trained beside the student and no part of it: nothing of them is left in what is exported.
    """

    def __init__(self, student_widths: Sequence[int], teacher_widths: Sequence[int]) -> None:
        """Make the maps.

        Args:
            student_widths: of the compared states, in order.
            teacher_widths: of the teacher's, as many; a pair of equal widths needs no map and gets
                none.

        Raises:
            InvalidInput: not as many of one as of the other.
        """
        super().__init__()
        rule = f"be {len(student_widths)} widths like student_widths"
        same = len(student_widths) == len(teacher_widths)
        require(same, "Projectors", "teacher_widths", rule, len(teacher_widths))
        self.maps = nn.ModuleList(
            nn.Identity() if s == t else nn.Linear(s, t)
            for s, t in zip(student_widths, teacher_widths, strict=True)
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.maps)

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Each state in the width of the teacher's."""
        return [project(state) for project, state in zip(self.maps, states, strict=True)]


def hidden_mse(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    projectors: Projectors | None = None,
    *,
    student_prefix: int | None = None,
    teacher_prefix: int | None = None,
) -> Tensor:
    """Mean squared difference of hidden states, averaged over the compared pairs.

    ``(1 / pairs) * sum_pairs mean((x_S - x_T)^2)`` over images, tokens and channels. Source: Hou et
    al., "DynaBERT: Dynamic BERT with Adaptive Width and Depth", NeurIPS 2020 (arXiv:2004.04037),
    the hidden states' term; embeddings output may be one of the pairs.

    Args:
        students: states ``(B, N, D)`` in the order of the pairs; gradients flow here only.
        teachers: states ``(B, N, E)``, as many; tokens are brought together by ``align_tokens``.
        projectors: maps to the teacher's widths; without them the widths are equal.
        student_prefix: see ``align_tokens``.
        teacher_prefix: see ``align_tokens``.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 states).

    Raises:
        InvalidInput: numbers of states, images, tokens or widths that do not fit.
    """
    op = "hidden_mse"
    check_pairs(op, students, teachers)
    if projectors is not None:
        rule = f"have {len(students)} maps, one for each pair"
        require(len(projectors) == len(students), op, "projectors", rule, len(projectors))
    terms = []
    for number, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        student, teacher = align_tokens(
            student,
            teacher.detach(),
            student_prefix=student_prefix,
            teacher_prefix=teacher_prefix,
            op=op,
        )
        if projectors is not None:
            student = projectors.maps[number](student)
        terms.append(_mse(op, f"students[{number}]", student, teacher))
    return torch.stack(terms).mean()


def feature_mse(
    student_BD: Tensor, teacher_BE: Tensor, projector: nn.Module | None = None
) -> Tensor:
    """Mean squared difference of pooled features, the input of the last linear layer.

    Args:
        student_BD: ``(B, D)``; gradients flow here only.
        teacher_BE: ``(B, E)``.
        projector: map from D to E; without it D = E.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 features).

    Raises:
        InvalidInput: shapes disagree.
    """
    if projector is not None:
        student_BD = projector(student_BD)
    return _mse("feature_mse", "student_BD", student_BD, teacher_BE.detach())


def check_pairs(op: str, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    """Raise unless there are as many states of both, and at least one."""
    require(len(students) > 0, op, "students", "hold at least one state", 0)
    rule = f"hold {len(students)} states like students"
    require(len(teachers) == len(students), op, "teachers", rule, len(teachers))


def _mse(op: str, name: str, student: Tensor, teacher: Tensor) -> Tensor:
    rule = f"have shape {tuple(teacher.shape)} like the teacher's, which a projector can make"
    require(student.shape == teacher.shape, op, name, rule, tuple(student.shape))
    return (wide(student) - wide(teacher)).square().mean()
