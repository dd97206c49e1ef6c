"""Cross-entropy with labels, divergence from a teacher, and the gradient of both, row by row.

B samples, C classes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._launch import launch, next_power_of_2

# classes that a program holds at one time; more of them are walked in order, twice
BLOCK_CLASSES = 2048
# rows that the program of the second launch holds at one time
BLOCK_ROWS = 1024


@triton.jit
def _add_to_lse(top, total, z):
    """Running maximum and sum of exponentials; masked elements of ``z`` are -inf."""
    new_top = tl.maximum(top, tl.max(z, 0))
    return new_top, total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)


@triton.jit
def _kd_cross_entropy_kernel(
    student_ptr,  # (B, C), classes adjacent
    teacher_ptr,  # (B, C), classes adjacent
    label_ptr,  # (B,) int64, or (B, C) with classes adjacent
    part_ptr,  # (2, B): ce and kl of each row
    grad_ptr,  # (B, C), contiguous; not written without HAS_GRADIENT
    num_rows,
    grad_ce,  # weight of ce in the gradient
    grad_kl,  # weight of kl in it, over the temperature
    inverse_temperature,
    smoothing,
    # as constants, because 1000 classes are a multiple of 8 numbers and not of the 16 that a
    # launch looks for
    STRIDE_STUDENT: tl.constexpr,
    STRIDE_TEACHER: tl.constexpr,
    STRIDE_LABEL: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    HAS_SHARES: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program owns a row
    pid = tl.program_id(0).to(tl.int64)
    student_ptr += pid * STRIDE_STUDENT
    teacher_ptr += pid * STRIDE_TEACHER
    label_ptr += pid * STRIDE_LABEL
    offs = tl.arange(0, BLOCK_C)
    s_top, s_total = float("-inf"), 0.0
    u_top, u_total = float("-inf"), 0.0
    t_top, t_total = float("-inf"), 0.0
    total_share = 0.0
    for start in range(0, NUM_CLASSES, BLOCK_C):
        offs_c = start + offs
        mask = offs_c < NUM_CLASSES
        s = tl.load(student_ptr + offs_c, mask=mask, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + offs_c, mask=mask, other=float("-inf")).to(tl.float32)
        s_top, s_total = _add_to_lse(s_top, s_total, s)
        u_top, u_total = _add_to_lse(u_top, u_total, s * inverse_temperature)
        t_top, t_total = _add_to_lse(t_top, t_total, t * inverse_temperature)
        if HAS_SHARES:
            total_share += tl.sum(tl.load(label_ptr + offs_c, mask=mask, other=0.0).to(tl.float32))
    s_log, u_log, t_log = tl.log(s_total), tl.log(u_total), tl.log(t_total)
    uniform = smoothing / NUM_CLASSES
    if HAS_SHARES:
        label = 0
        total_share = total_share * (1.0 - smoothing) + smoothing
    else:
        label = tl.load(label_ptr)
        total_share = 1.0
    ce, kl = 0.0, 0.0
    for start in range(0, NUM_CLASSES, BLOCK_C):
        offs_c = start + offs
        mask = offs_c < NUM_CLASSES
        s = tl.load(student_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
        if HAS_SHARES:
            share = tl.load(label_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
        else:
            share = tl.where(offs_c == label, 1.0, 0.0)
        q = share * (1.0 - smoothing) + uniform
        # the maximum goes first, so that large logits lose no digits to it
        log_p = (s - s_top) - s_log
        log_u = (s * inverse_temperature - u_top) - u_log
        log_t = (t * inverse_temperature - t_top) - t_log
        t_share = tl.exp(log_t)
        # classes of no share add nothing, whatever their logit
        ce -= tl.sum(tl.where(mask & (q != 0.0), q * log_p, 0.0), 0)
        kl += tl.sum(tl.where(mask & (t_share != 0.0), t_share * (log_t - log_u), 0.0), 0)
        if HAS_GRADIENT:
            grad = grad_ce * (tl.exp(log_p) * total_share - q) + grad_kl * (tl.exp(log_u) - t_share)
            tl.store(grad_ptr + pid * NUM_CLASSES + offs_c, grad, mask=mask)
    if not HAS_SHARES:
        # no class has this number
        ce = tl.where((label >= 0) & (label < NUM_CLASSES), ce, float("nan"))
    tl.store(part_ptr + pid, ce)
    tl.store(part_ptr + num_rows + pid, kl)


@triton.jit
def _mean_of_rows_kernel(
    part_ptr,  # (2, B)
    loss_ptr,
    ce_ptr,
    kd_ptr,
    ce_weight,
    kd_weight,
    factor,
    NUM_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    # a single program, so that the order is always the same
    offs = tl.arange(0, BLOCK_B)
    ce, kl = tl.zeros((BLOCK_B,), tl.float32), tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, NUM_ROWS, BLOCK_B):
        mask = start + offs < NUM_ROWS
        ce += tl.load(part_ptr + start + offs, mask=mask, other=0.0)
        kl += tl.load(part_ptr + NUM_ROWS + start + offs, mask=mask, other=0.0)
    ce_mean = tl.sum(ce, 0) / NUM_ROWS
    kd = tl.sum(kl, 0) / NUM_ROWS * factor
    tl.store(ce_ptr, ce_mean)
    tl.store(kd_ptr, kd)
    tl.store(loss_ptr, ce_weight * ce_mean + kd_weight * kd)


def kd_cross_entropy_fwd_bwd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    labels: Tensor,
    ce_weight: float,
    kd_weight: float,
    factor: float,
    temperature: float,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch both kernels; see ``vitprune_fast.ops.kd_cross_entropy``."""
    batch, classes = student_BC.shape
    student_BC, teacher_BC = _rows(student_BC), _rows(teacher_BC)
    has_shares = labels.dim() == 2
    labels = _rows(labels) if has_shares else labels
    dtype = torch.float32
    loss, ce, kd = (student_BC.new_empty((), dtype=dtype) for _ in range(3))
    part_2B = student_BC.new_empty(2, batch, dtype=dtype)
    grad_BC = student_BC.new_empty((batch, classes) if with_gradient else (0,), dtype=dtype)
    block = min(next_power_of_2(classes), BLOCK_CLASSES)
    launch(
        _kd_cross_entropy_kernel,
        batch,
        student_BC,
        teacher_BC,
        labels,
        part_2B,
        grad_BC,
        batch,
        ce_weight / batch,
        kd_weight * factor / temperature / batch,
        1 / temperature,
        label_smoothing,
        STRIDE_STUDENT=student_BC.stride(0),
        STRIDE_TEACHER=teacher_BC.stride(0),
        STRIDE_LABEL=labels.stride(0),
        NUM_CLASSES=classes,
        HAS_SHARES=has_shares,
        HAS_GRADIENT=with_gradient,
        BLOCK_C=block,
        num_warps=num_warps(block),
    )
    launch(
        _mean_of_rows_kernel,
        1,
        part_2B,
        loss,
        ce,
        kd,
        ce_weight,
        kd_weight,
        factor,
        NUM_ROWS=batch,
        BLOCK_B=min(next_power_of_2(batch), BLOCK_ROWS),
        num_warps=4,
    )
    return loss, ce, kd, grad_BC


def num_warps(block: int) -> int:
    """Of a program that holds ``block`` classes: eight numbers for each thread, where possible."""
    return min(max(block // 256, 1), 8)


def _rows(x_BC: Tensor) -> Tensor:
    return x_BC if x_BC.stride(1) == 1 else x_BC.contiguous()
