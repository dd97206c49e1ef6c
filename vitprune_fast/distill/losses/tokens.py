"""Bring the tokens of a student and a teacher together, and their blocks.

B images, N tokens, D width of the student, E width of the teacher. Prefix tokens (class,
distillation, registers) come before the patches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from vitprune_fast._checks import require, require_dims
from vitprune_fast.errors import InvalidInput


def align_tokens(
    student_BND: Tensor,
    teacher_BNE: Tensor,
    *,
    student_prefix: int | None = None,
    teacher_prefix: int | None = None,
    op: str = "align_tokens",
) -> tuple[Tensor, Tensor]:
    """The same number of tokens on both sides, whichever has more.

    * As many prefix tokens and patches on both sides: nothing changes, prefix tokens stay.
    * As many patches: the first prefix tokens of the side that has more are dropped.
    * Square grids, one m times as fine: all prefix tokens are dropped and each m x m neighbouring
      patches of the finer one become one token, side by side in its width (m * m times as wide).

    Source: Hao et al., "Learning Efficient Vision Transformers via Fine-Grained Manifold
    Distillation", NeurIPS 2022 (arXiv:2107.01378), whose code drops tokens of the student alone.

    Args:
        student_BND: ``(B, N_S, D)``.
        teacher_BNE: ``(B, N_T, E)``.
        student_prefix: number of its prefix tokens; None takes what is over a square grid.
        teacher_prefix: the same of the teacher.
        op: name for the error sentence.

    Returns:
        Student ``(B, N, D')`` and teacher ``(B, N, E')``; views where nothing is merged.

    Raises:
        InvalidInput: other numbers of images, or grids that do not fit.
    """
    for name, x in (("student_BND", student_BND), ("teacher_BNE", teacher_BNE)):
        require_dims(op, name, x, 3)
    batch, num_student, _ = student_BND.shape
    num_teacher = teacher_BNE.shape[1]
    rule = f"have {batch} images like student_BND"
    require(teacher_BNE.shape[0] == batch, op, "teacher_BNE", rule, teacher_BNE.shape[0])
    if num_student == num_teacher and student_prefix == teacher_prefix:
        return student_BND, teacher_BNE
    num_student_prefix = _prefix(op, "student_prefix", num_student, student_prefix)
    num_teacher_prefix = _prefix(op, "teacher_prefix", num_teacher, teacher_prefix)
    patches_student = num_student - num_student_prefix
    patches_teacher = num_teacher - num_teacher_prefix
    if patches_student == patches_teacher:
        shared = min(num_student_prefix, num_teacher_prefix)
        return student_BND[:, num_student_prefix - shared :], teacher_BNE[
            :, num_teacher_prefix - shared :
        ]
    side_student, side_teacher = math.isqrt(patches_student), math.isqrt(patches_teacher)
    square = side_student**2 == patches_student and side_teacher**2 == patches_teacher
    low, high = sorted((side_student, side_teacher))
    if not square or low == 0 or high % low:
        raise InvalidInput(
            f"{op}: teacher_BNE must have the grid of student_BND, or square ones of which one "
            f"divides the other, got {patches_teacher} and {patches_student} patches after "
            f"{num_teacher_prefix} and {num_student_prefix} prefix tokens; "
            "student_prefix and teacher_prefix say how many there are"
        )
    student_BND = _merge(student_BND[:, num_student_prefix:], side_student, low)
    return student_BND, _merge(teacher_BNE[:, num_teacher_prefix:], side_teacher, low)


def _prefix(op: str, name: str, num_tokens: int, prefix: int | None) -> int:
    """What was given, or what is over the largest square."""
    if prefix is None:
        return num_tokens - math.isqrt(num_tokens) ** 2
    require(0 <= prefix < num_tokens, op, name, f"be from 0 to {num_tokens - 1}", prefix)
    return prefix


def _merge(x_BND: Tensor, side: int, wanted: int) -> Tensor:
    """Tokens of a square grid, each m x m of them side by side in the width of one."""
    m = side // wanted
    if m == 1:
        return x_BND
    batch, _, width = x_BND.shape
    x = x_BND.reshape(batch, wanted, m, wanted, m, width)
    return x.transpose(2, 3).reshape(batch, wanted * wanted, m * m * width)


def map_blocks(
    student_depth: int,
    teacher_depth: int,
    *,
    kept: Sequence[int] | None = None,
    pairs: Iterable[tuple[int, int]] | None = None,
) -> list[tuple[int, int]]:
    """Which block of the teacher each block of the student is compared with.

    * As they come: student block k of L_S and teacher block ceil((k + 1) * L_T / L_S) - 1, so that
      the last ones meet and every student block answers for an equal share of the teacher.
    * ``kept``: the student is made of these blocks of the teacher. Each meets the teacher's last
      block before the next kept one, so that it learns the whole span that was dropped after it.
    * ``pairs``: as said.

    Args:
        student_depth: number of blocks, L_S.
        teacher_depth: number of blocks, L_T.
        kept: teacher's number of each of the student's blocks, ascending.
        pairs: (student block, teacher block), both counted from 0.

    Returns:
        Pairs (student block, teacher block) in the order of the student.

    Raises:
        InvalidInput: both ``kept`` and ``pairs``, or numbers that no block has.
    """
    op = "map_blocks"
    for name, depth in (("student_depth", student_depth), ("teacher_depth", teacher_depth)):
        require(depth >= 1, op, name, "be at least 1", depth)
    if kept is not None:
        require(pairs is None, op, "pairs", "be None where kept is given", pairs)
        rising = all(a < b for a, b in itertools.pairwise(kept))
        fits = len(kept) == student_depth and min(kept) >= 0 and max(kept) < teacher_depth
        rule = f"be {student_depth} ascending numbers from 0 to {teacher_depth - 1}"
        require(rising and fits, op, "kept", rule, list(kept))
        return list(enumerate([*(block - 1 for block in kept[1:]), teacher_depth - 1]))
    if pairs is not None:
        pairs = [(int(s), int(t)) for s, t in pairs]
        fits = all(0 <= s < student_depth and 0 <= t < teacher_depth for s, t in pairs)
        rule = f"be pairs of blocks below {student_depth} and {teacher_depth}, at least one"
        require(bool(pairs) and fits, op, "pairs", rule, pairs)
        return sorted(pairs)
    return [(k, -(-(k + 1) * teacher_depth // student_depth) - 1) for k in range(student_depth)]
