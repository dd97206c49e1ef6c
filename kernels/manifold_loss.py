"""Similarities among a student's rows against those among a teacher's, and the gradient, at once.

S sets, R rows, D width of the student, E width of the teacher.

Two launches. The first takes the inverse length of every row. In the second one program owns
BLOCK_M rows of a set: it computes their similarities to BLOCK_N rows on both sides, squares the
difference, and multiplies it at once with those rows for the gradient, so that no similarity leaves
the registers. Rows are read as they are and products scaled, not the other way round, because a
product of 16-bit numbers is exact and a rounded row of length 1 is not.

Where a set has no more than BLOCK_N rows a program finds all their differences at once, and walks
the width of the gradient with them. Else each program makes BLOCK_D columns of the gradient, which
fit in registers while it walks the rows, and finds the same differences as its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._attention_tiles import large_tiles_of, precision
from vitprune_fast.kernels._launch import INTERPRETED, cdiv, launch, next_power_of_2
from vitprune_fast.reference.manifold_loss import MIN_NORM, new_gradient

# a matrix product has at least this many rows and columns
SMALLEST_TILE = 16
# rows and columns of a tile of the first launch
NORM_ROWS, NORM_COLUMNS = 16, 128
# differences are within 2, and fp16 has few small numbers: a power of two, so that nothing is lost
SCALE = tl.constexpr(4096.0)


@triton.jit
def _tile(
    ptr,  # first element of the tile
    stride,
    num_rows,  # of the tile that are there
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of adjacent columns; zero outside."""
    # 32 bits suffice inside a tile
    offs_r = tl.arange(0, ROWS)[:, None]
    offs_c = tl.arange(0, COLUMNS)[None, :]
    mask = (offs_r < num_rows) & (offs_c < num_columns)
    return tl.load(ptr + (offs_r * stride + offs_c), mask=mask, other=0.0)


@triton.jit
def _operand(x, ELEMENT: tl.constexpr, UPCAST: tl.constexpr):
    """``x`` rounded to what the tensor cores multiply; the interpreter multiplies bf16 wrongly."""
    x = x.to(ELEMENT)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _inverse_norms(
    ptr,
    inverse_ptr,
    stride,
    num_rows,
    MIN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    total = tl.zeros((BLOCK_R,), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        x = _tile(ptr + k, stride, num_rows, WIDTH - k, BLOCK_R, BLOCK_K).to(tl.float32)
        total += tl.sum(x * x, 1)
    norm = tl.sqrt(total)
    # NaN is not <= anything, so it stays
    has_none = norm <= MIN
    inverse = tl.where(has_none, 0.0, 1.0 / tl.where(has_none, 1.0, norm))
    offs = tl.arange(0, BLOCK_R)
    tl.store(inverse_ptr + offs, inverse, mask=offs < num_rows)


@triton.jit
def _inverse_norms_kernel(
    student_ptr,  # (S, R, D), columns adjacent
    teacher_ptr,  # (S, R, E), columns adjacent
    inverse_ptr,  # (S, 2, R), contiguous: of the student, then of the teacher
    stride_student_s,
    stride_student_r,
    stride_teacher_s,
    stride_teacher_r,
    NUM_ROWS: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    MIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (NUM_ROWS + BLOCK_R - 1) // BLOCK_R
    row = (tl.program_id(0) % NUM_BLOCKS).to(tl.int64) * BLOCK_R
    pid_s = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    inverse_ptr += pid_s * 2 * NUM_ROWS + row
    _inverse_norms(
        student_ptr + pid_s * stride_student_s + row * stride_student_r, inverse_ptr,
        stride_student_r, NUM_ROWS - row, MIN, STUDENT_WIDTH, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    _inverse_norms(
        teacher_ptr + pid_s * stride_teacher_s + row * stride_teacher_r, inverse_ptr + NUM_ROWS,
        stride_teacher_r, NUM_ROWS - row, MIN, TEACHER_WIDTH, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _similarities(
    m_ptr,  # first row of the tile of each side
    n_ptr,
    inverse_m,
    inverse_n,
    stride,
    rows_m,
    rows_n,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Cosines of BLOCK_M rows with BLOCK_N rows; 0 where there is no row."""
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        m = _operand(_tile(m_ptr + k, stride, rows_m, WIDTH - k, BLOCK_M, BLOCK_K), ELEMENT, UPCAST)
        n = _operand(_tile(n_ptr + k, stride, rows_n, WIDTH - k, BLOCK_N, BLOCK_K), ELEMENT, UPCAST)
        products = tl.dot(m, tl.trans(n), products, input_precision=PRECISION)
    return products * inverse_m[:, None] * inverse_n[None, :]


@triton.jit
def _store_gradient(
    g,  # differences times rows of length 1
    along,  # (BLOCK_M,): the part of it that only changes the length
    student_ptr,  # first element of the rows that the program owns
    grad_ptr,
    inverse_m,
    stride_student,
    stride_grad,
    rows_m,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    x = _tile(student_ptr, stride_student, rows_m, columns, BLOCK_M, BLOCK_D).to(tl.float32)
    grad = (g - x * (inverse_m * along)[:, None]) * inverse_m[:, None]
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_m < rows_m) & (offs_d < columns)
    ptrs = grad_ptr + (offs_m * stride_grad + offs_d)
    tl.store(ptrs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _manifold_loss_kernel(
    student_ptr,  # (S, R, D), columns adjacent
    teacher_ptr,  # (S, R, E), columns adjacent
    inverse_ptr,  # (S, 2, R), contiguous
    squares_ptr,  # (S, R), contiguous: sums of squared differences
    grad_ptr,  # (S, R, D), columns adjacent; not written without HAS_GRADIENT
    stride_student_s,
    stride_student_r,
    stride_teacher_s,
    stride_teacher_r,
    stride_grad_s,
    stride_grad_r,
    # as constants the bounds of the loops are static, which older interpreters need
    NUM_ROWS: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    STUDENT_ELEMENT: tl.constexpr,
    TEACHER_ELEMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STUDENT_PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    WHOLE: tl.constexpr = NUM_ROWS <= BLOCK_N
    SPLITS: tl.constexpr = (
        1 if WHOLE or not HAS_GRADIENT else (STUDENT_WIDTH + BLOCK_D - 1) // BLOCK_D
    )
    NUM_BLOCKS: tl.constexpr = (NUM_ROWS + BLOCK_M - 1) // BLOCK_M
    # the blocks of a set run side by side
    pid = tl.program_id(0)
    pid_d = pid % SPLITS
    pid_m = pid // SPLITS % NUM_BLOCKS
    pid_s = (pid // SPLITS // NUM_BLOCKS).to(tl.int64)
    row = pid_m.to(tl.int64) * BLOCK_M
    rows_m = NUM_ROWS - pid_m * BLOCK_M
    student_n_ptr = student_ptr + pid_s * stride_student_s
    teacher_n_ptr = teacher_ptr + pid_s * stride_teacher_s
    student_m_ptr = student_n_ptr + row * stride_student_r
    teacher_m_ptr = teacher_n_ptr + row * stride_teacher_r
    grad_ptr += pid_s * stride_grad_s + row * stride_grad_r
    student_inverse_ptr = inverse_ptr + pid_s * 2 * NUM_ROWS
    teacher_inverse_ptr = student_inverse_ptr + NUM_ROWS
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows_m
    student_inverse_m = tl.load(student_inverse_ptr + row + offs_m, mask=mask_m, other=0.0)
    teacher_inverse_m = tl.load(teacher_inverse_ptr + row + offs_m, mask=mask_m, other=0.0)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)
    g = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    d_start = pid_d * BLOCK_D
    for n_start in range(0, NUM_ROWS, BLOCK_N):
        rows_n = NUM_ROWS - n_start
        mask_n = offs_n < rows_n
        inverse_n = tl.load(teacher_inverse_ptr + n_start + offs_n, mask=mask_n, other=0.0)
        wanted = _similarities(
            teacher_m_ptr, teacher_n_ptr, teacher_inverse_m, inverse_n, stride_teacher_r,
            rows_m, rows_n, TEACHER_WIDTH, BLOCK_M, BLOCK_N, BLOCK_K,
            TEACHER_ELEMENT, TEACHER_PRECISION, UPCAST,
        )  # fmt: skip
        inverse_n = tl.load(student_inverse_ptr + n_start + offs_n, mask=mask_n, other=0.0)
        found = _similarities(
            student_m_ptr, student_n_ptr, student_inverse_m, inverse_n, stride_student_r,
            rows_m, rows_n, STUDENT_WIDTH, BLOCK_M, BLOCK_N, BLOCK_K,
            STUDENT_ELEMENT, STUDENT_PRECISION, UPCAST,
        )  # fmt: skip
        difference = found - wanted
        squares += tl.sum(difference * difference, 1)
        if HAS_GRADIENT:
            along += tl.sum(difference * found, 1)
            weight = _operand(difference * SCALE, STUDENT_ELEMENT, UPCAST)
            if WHOLE:
                for d in range(0, STUDENT_WIDTH, BLOCK_D):
                    columns = STUDENT_WIDTH - d
                    x = _tile(
                        student_n_ptr + d, stride_student_r, rows_n, columns, BLOCK_N, BLOCK_D
                    )
                    x = _operand(x.to(tl.float32) * inverse_n[:, None], STUDENT_ELEMENT, UPCAST)
                    part = tl.dot(weight, x, input_precision=STUDENT_PRECISION) * (1.0 / SCALE)
                    _store_gradient(
                        part, along, student_m_ptr + d, grad_ptr + d, student_inverse_m,
                        stride_student_r, stride_grad_r, rows_m, columns, BLOCK_M, BLOCK_D,
                    )  # fmt: skip
            else:
                columns = STUDENT_WIDTH - d_start
                x_ptr = student_n_ptr + d_start
                x = _tile(x_ptr, stride_student_r, rows_n, columns, BLOCK_N, BLOCK_D)
                x = _operand(x.to(tl.float32) * inverse_n[:, None], STUDENT_ELEMENT, UPCAST)
                g = tl.dot(weight, x, g, input_precision=STUDENT_PRECISION)
        student_n_ptr += BLOCK_N * stride_student_r
        teacher_n_ptr += BLOCK_N * stride_teacher_r
    if HAS_GRADIENT and not WHOLE:
        _store_gradient(
            g * (1.0 / SCALE), along, student_m_ptr + d_start, grad_ptr + d_start,
            student_inverse_m, stride_student_r, stride_grad_r, rows_m, STUDENT_WIDTH - d_start,
            BLOCK_M, BLOCK_D,
        )  # fmt: skip
    if pid_d == 0:
        # the launcher sums the rows: Triton 3.6 fails to compile a sum of these sums for sm_100
        tl.store(squares_ptr + pid_s * NUM_ROWS + row + offs_m, squares, mask=mask_m)


class Tiles(NamedTuple):
    """Sizes of a program of the second launch."""

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


def tiles(num_rows: int, operand_bytes: int, stored_bytes: int, large: bool) -> Tiles:
    """Chosen so that nothing spills (tests/compiled), by the bytes of the wider side's numbers."""
    rows = max(next_power_of_2(num_rows), SMALLEST_TILE)
    if operand_bytes == 4:
        # without tensor cores the rows of a set do not fit
        return Tiles(min(rows, 32), min(rows, 32), 16, 128, 4, 2)
    if rows <= 256:
        block_m = min(rows, 64 if large else 32)
        warps = 8 if rows >= 128 else 4
        block_k = 16 if large and stored_bytes == 4 else 32
        return Tiles(block_m, rows, block_k, 64 if stored_bytes == 2 else 32, warps, 2)
    if large:
        return Tiles(64, 128, 32, 128 if stored_bytes == 2 else 64, 8, 2)
    return Tiles(64, 64, 32, 128, 8, 2)


def manifold_loss_fwd_bwd(
    student_SRD: Tensor, teacher_SRE: Tensor, with_gradient: bool, operand: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Launch both kernels; gives the loss and the gradient, which is empty unless asked for.

    See ``vitprune_fast.ops.manifold_loss``.
    """
    grad_SRD = new_gradient(student_SRD, with_gradient)
    student_SRD, teacher_SRE = _near_columns(student_SRD), _near_columns(teacher_SRE)
    sets, rows, width = student_SRD.shape
    teacher_width = teacher_SRE.shape[2]
    has_gradient = grad_SRD.numel() > 0
    elements = [operand or x.dtype for x in (student_SRD, teacher_SRE)]
    chosen = tiles(
        rows,
        max(element.itemsize for element in elements),
        max(student_SRD.itemsize, teacher_SRE.itemsize),
        large_tiles_of(student_SRD),
    )
    num_blocks = cdiv(rows, chosen.block_m)
    splits = cdiv(width, chosen.block_d) if has_gradient and rows > chosen.block_n else 1
    inverse_S2R = student_SRD.new_empty(sets, 2, rows, dtype=torch.float32)
    squares_SR = student_SRD.new_empty(sets, rows, dtype=torch.float32)
    grad_strides = grad_SRD.stride()[:2] if has_gradient else (0, 0)
    inputs = (*student_SRD.stride()[:2], *teacher_SRE.stride()[:2])
    sizes = {"NUM_ROWS": rows, "STUDENT_WIDTH": width, "TEACHER_WIDTH": teacher_width}
    launch(
        _inverse_norms_kernel,
        sets * cdiv(rows, NORM_ROWS),
        student_SRD,
        teacher_SRE,
        inverse_S2R,
        *inputs,
        **sizes,
        MIN=MIN_NORM,
        BLOCK_R=NORM_ROWS,
        BLOCK_K=NORM_COLUMNS,
        num_warps=4,
    )
    launch(
        _manifold_loss_kernel,
        sets * num_blocks * splits,
        student_SRD,
        teacher_SRE,
        inverse_S2R,
        squares_SR,
        grad_SRD,
        *inputs,
        *grad_strides,
        **sizes,
        HAS_GRADIENT=has_gradient,
        STUDENT_ELEMENT=_ELEMENTS[elements[0]],
        TEACHER_ELEMENT=_ELEMENTS[elements[1]],
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
        BLOCK_D=chosen.block_d,
        STUDENT_PRECISION=precision(elements[0]),
        TEACHER_PRECISION=precision(elements[1]),
        UPCAST=INTERPRETED,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    loss = squares_SR.sum(dtype=torch.float64).mul_(1 / (sets * rows**2)).float()
    return loss, grad_SRD


_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _near_columns(x: Tensor) -> Tensor:
    """``x``, copied when columns are apart or offsets inside a tile would not fit in 32 bits."""
    return x if x.stride(2) == 1 and x.stride(1) < 2**23 else x.contiguous()
