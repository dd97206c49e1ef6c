"""Which block of a student meets which of a teacher, and how their tokens are brought together.

B images, N tokens, D width of the student, E width of the teacher. Prefix tokens (class,
distillation, registers) come before the patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from vitprune_fast.errors import InvalidInput

# (student block, teacher block)
Pairs = list[tuple[int, int]]


def align_tokens(
    student: Tensor, student_prefix: int, teacher: Tensor, teacher_prefix: int
) -> tuple[Tensor, Tensor]:
    """The same number of tokens on both sides, whichever has more.

    * As many prefix tokens and patches on both sides: nothing changes, prefix tokens stay.
    * As many patches: the first prefix tokens of the side that has more are dropped.
    * Square grids, one m times as fine: all prefix tokens are dropped and each m x m neighbouring
      patches of the finer one become one token, side by side in its width (m * m times as wide).

    Source: Hao et al., "Learning Efficient Vision Transformers via Fine-Grained Manifold
    Distillation", NeurIPS 2022 (arXiv:2107.01378), whose code drops tokens of the student alone.

    Args:
        student: ``(B, N_S, ..., D)``.
        student_prefix: number of its prefix tokens.
        teacher: ``(B, N_T, ..., E)``.
        teacher_prefix: the same of the teacher.

    Returns:
        Student ``(B, N, ..., D')`` and teacher ``(B, N, ..., E')``; views where nothing is merged.

    Raises:
        InvalidInput: grids that do not fit.
    """
    ours, theirs = student.shape[1] - student_prefix, teacher.shape[1] - teacher_prefix
    if (ours, student_prefix) == (theirs, teacher_prefix):
        return student, teacher
    if ours == theirs:
        shared = min(student_prefix, teacher_prefix)
        return student[:, student_prefix - shared :], teacher[:, teacher_prefix - shared :]
    side, other = math.isqrt(max(ours, 0)), math.isqrt(max(theirs, 0))
    low, high = sorted((side, other))
    if (side**2, other**2) != (ours, theirs) or low == 0 or high % low:
        raise InvalidInput(
            "distill: the teacher's tokens must have the grid of the student's, or square ones of "
            f"which one divides the other, got {theirs} and {ours} patches after {teacher_prefix} "
            f"and {student_prefix} prefix tokens"
        )
    return (
        _merge(student[:, student_prefix:], side, low),
        _merge(teacher[:, teacher_prefix:], other, low),
    )


def _merge(x: Tensor, side: int, wanted: int) -> Tensor:
    """Tokens of a square grid, each m x m of them side by side in the width of one."""
    m = side // wanted
    if m == 1:
        return x
    batch, _, *middle, width = x.shape
    x = x.reshape(batch, wanted, m, wanted, m, *middle, width)
    # the places within a merged token move next to its width
    x = x.movedim((2, 4), (-3, -2))
    return x.reshape(batch, wanted * wanted, *middle, m * m * width)


def block_pairs(
    layers: Sequence[tuple[int, int]], depth: int, teacher_depth: int, ends: int | None = None
) -> Pairs:
    """Pairs of (student block, teacher block), both counted from 0.

    Args:
        layers: the pairs, negative numbers from the end.
        depth: blocks of the student, L_S.
        teacher_depth: of the teacher, L_T.
        ends: without ``layers``: so many blocks at either end, one with one. None: student block k
            with ceil((k + 1) * L_T / L_S) - 1, so that the last ones meet and every student block
            answers for an equal share of the teacher.

    Raises:
        InvalidInput: numbers that no block has.
    """
    for a, b in layers:
        if not (-depth <= a < depth and -teacher_depth <= b < teacher_depth):
            raise InvalidInput(
                f"distill: layers must be blocks of the student ({depth}) and the teacher "
                f"({teacher_depth}), got {a} {b}"
            )
    if layers:
        return [(a % depth, b % teacher_depth) for a, b in layers]
    if ends is None:
        return [(k, -(-(k + 1) * teacher_depth // depth) - 1) for k in range(depth)]
    ends = min(ends, max(depth // 2, 1), max(teacher_depth // 2, 1))
    first = [(i, i) for i in range(ends)]
    last = [(depth - i, teacher_depth - i) for i in range(ends, 0, -1)]
    return list(dict.fromkeys((*first, *last)))
