"""Backward of LayerNorm or RMSNorm, fused with the per-sample score of removing each channel.

B batch, N tokens, C channels, P parts of the tokens of one sample.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._attention_tiles import pieces
from vitprune_fast.kernels._launch import cdiv, launch, next_power_of_2
from vitprune_fast.wide import wide_dtype

# tokens of one program: enough programs for a GPU from few samples, and short sums
PART_TOKENS = 16
# numbers of one tile, whole rows of it, and of a row that is too long for the registers of one warp
TILE_NUMBERS = 768
ROW_NUMBERS = 1280
# channels of one program of the second stage, 4 in a thread
PARTS_BLOCK_C = 256
PARTS_WARPS = 2


@triton.jit
def _channels(ptr, columns, stride, mask, dtype: tl.constexpr):
    """One number for each channel of a piece, for every row."""
    return tl.load(ptr + columns * stride, mask=mask, other=0.0).to(dtype)


@triton.jit
def _mean(a, b, IS_SPLIT: tl.constexpr, NUM_CHANNELS: tl.constexpr):
    """Over each row, of one piece or of both."""
    total = tl.sum(a, 1)
    if IS_SPLIT:
        total += tl.sum(b, 1)
    return total[:, None] * (1.0 / NUM_CHANNELS)


@triton.jit
def _norm_score_bwd_kernel(
    x_ptr,  # (B, N, C)
    grad_y_ptr,  # (B, N, C)
    weight_ptr,  # (C,), or anything without HAS_WEIGHT
    bias_ptr,  # (C,), or anything without HAS_BIAS
    grad_x_ptr,  # (B, N, C), contiguous
    part_ptr,  # (B, P, C)
    stride_x_b,
    stride_x_n,
    stride_x_c,
    stride_g_b,
    stride_g_n,
    stride_g_c,
    stride_weight,
    stride_bias,
    # as constants they need no mask where a block divides them, and older interpreters cannot run
    # a loop with a run-time bound
    NUM_TOKENS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    # channels of the two pieces of a row, with little or no padding; C1 may be 0
    C0: tl.constexpr,
    C1: tl.constexpr,
    # a run-time number would be rounded to fp32
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_RMS: tl.constexpr,
    COUNTS_OUTPUT: tl.constexpr,
):
    # one program owns one part of the tokens of one sample; it holds whole rows, BLOCK_N at a
    # time, mostly in a single warp: sums over them then need no barrier
    pid_b = (tl.program_id(0) // NUM_PARTS).to(tl.int64)
    pid_p = tl.program_id(0) % NUM_PARTS
    dtype = part_ptr.dtype.element_ty
    IS_SPLIT: tl.constexpr = C1 > 0
    a = tl.arange(0, C0).to(tl.int64)[None, :]
    # without a second piece all that is made for it repeats the first, and is dropped unused
    b = C0 + tl.arange(0, C1).to(tl.int64)[None, :] if IS_SPLIT else a
    mask_a = a < NUM_CHANNELS
    mask_b = b < NUM_CHANNELS
    if HAS_WEIGHT:
        weight_a = _channels(weight_ptr, a, stride_weight, mask_a, dtype)
        weight_b = _channels(weight_ptr, b, stride_weight, mask_b, dtype)
    total_a = tl.zeros((BLOCK_N, C0), dtype)
    total_b = tl.zeros((BLOCK_N, C1), dtype) if IS_SPLIT else total_a
    # what a row adds to all its channels alike
    level = tl.zeros((BLOCK_N, 1), dtype)
    for n_start in range(0, PART_TOKENS, BLOCK_N):
        offs_n = (pid_p * PART_TOKENS + n_start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask_n = offs_n < NUM_TOKENS
        x_row = x_ptr + pid_b * stride_x_b + offs_n * stride_x_n
        x_a = tl.load(x_row + a * stride_x_c, mask=mask_n & mask_a, other=0.0).to(dtype)
        grad_row = grad_y_ptr + pid_b * stride_g_b + offs_n * stride_g_n
        grad_a = tl.load(grad_row + a * stride_g_c, mask=mask_n & mask_a, other=0.0).to(dtype)
        x_b, grad_b = x_a, grad_a
        if IS_SPLIT:
            x_b = tl.load(x_row + b * stride_x_c, mask=mask_n & mask_b, other=0.0).to(dtype)
            grad_b = tl.load(grad_row + b * stride_g_c, mask=mask_n & mask_b, other=0.0).to(dtype)
        if COUNTS_OUTPUT and HAS_BIAS:
            # from the cache each time: kept across the loop it would cost registers
            total_a += grad_a * _channels(bias_ptr, a, stride_bias, mask_a, dtype)
            total_b += grad_b * _channels(bias_ptr, b, stride_bias, mask_b, dtype)
        if HAS_WEIGHT:
            grad_a *= weight_a
            grad_b *= weight_b
        if not IS_RMS:
            mean = _mean(x_a, x_b, IS_SPLIT, NUM_CHANNELS)
            x_a = tl.where(mask_a, x_a - mean, 0.0)
            x_b = tl.where(mask_b, x_b - mean, 0.0)
        variance = _mean(x_a * x_a, x_b * x_b, IS_SPLIT, NUM_CHANNELS)
        # a row that is only padding has no variance, and must not divide by an eps of 0
        scale = tl.rsqrt(tl.where(mask_n, variance + EPS, 1.0))
        x_a *= scale
        x_b *= scale
        c1 = _mean(grad_a * x_a, grad_b * x_b, IS_SPLIT, NUM_CHANNELS)
        level += (variance * scale * scale) * (c1 * 0.5)
        share_a = x_a * (c1 * 0.5)
        share_b = x_b * (c1 * 0.5)
        out_a = grad_a - x_a * c1
        out_b = grad_b - x_b * c1
        if not IS_RMS:
            c2 = _mean(grad_a, grad_b, IS_SPLIT, NUM_CHANNELS)
            share_a += c2
            share_b += c2
            out_a -= c2
            out_b -= c2
        if COUNTS_OUTPUT:
            share_a -= grad_a
            share_b -= grad_b
        total_a -= x_a * share_a
        total_b -= x_b * share_b
        out_row = grad_x_ptr + (pid_b * NUM_TOKENS + offs_n) * NUM_CHANNELS
        element: tl.constexpr = grad_x_ptr.dtype.element_ty
        tl.store(out_row + a, (out_a * scale).to(element), mask=mask_n & mask_a)
        if IS_SPLIT:
            tl.store(out_row + b, (out_b * scale).to(element), mask=mask_n & mask_b)
    part_row = part_ptr + (pid_b * NUM_PARTS + pid_p) * NUM_CHANNELS
    tl.store(part_row + a, tl.sum(total_a + level, 0)[None, :], mask=mask_a)
    if IS_SPLIT:
        tl.store(part_row + b, tl.sum(total_b + level, 0)[None, :], mask=mask_b)


@triton.jit
def _add_parts_kernel(
    part_ptr,  # (B, P, C)
    score_ptr,  # (B, C)
    NUM_CHANNELS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program owns BLOCK_C channels of one sample and adds the parts in order
    num_blocks = tl.cdiv(NUM_CHANNELS, BLOCK_C)
    pid_b = (tl.program_id(0) // num_blocks).to(tl.int64)
    offs_c = (tl.program_id(0) % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < NUM_CHANNELS
    part_row = part_ptr + pid_b * NUM_PARTS * NUM_CHANNELS + offs_c
    score = tl.zeros((BLOCK_C,), score_ptr.dtype.element_ty)
    for part in range(0, NUM_PARTS):
        score += tl.load(part_row + part * NUM_CHANNELS, mask=mask_c, other=0.0)
    tl.store(score_ptr + pid_b * NUM_CHANNELS + offs_c, score, mask=mask_c)


def tile(channels: int, itemsize: int) -> tuple[int, int, int, int]:
    """Tokens of one tile, channels of both pieces of a row, and the warps that share it."""
    first, second = pieces(channels)
    width = first + second
    block_n = max(1, min(PART_TOKENS, TILE_NUMBERS // width))
    warps = width * itemsize // (4 * ROW_NUMBERS)
    return (
        next_power_of_2(block_n + 1) // 2,
        first,
        second,
        min(16, next_power_of_2(warps + 1)),
    )


def norm_score_bwd(
    x_BNC: Tensor,
    grad_y_BNC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    rms: bool,
    output: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; see ``vitprune_fast.ops.norm_score``."""
    batch, num_tokens, channels = x_BNC.shape
    dtype = wide_dtype(x_BNC)
    grad_x_BNC = x_BNC.new_empty(x_BNC.shape)
    if grad_x_BNC.numel() == 0:
        return grad_x_BNC, x_BNC.new_zeros(batch, channels, dtype=dtype)
    num_parts = cdiv(num_tokens, PART_TOKENS)
    part_BPC = x_BNC.new_empty(batch, num_parts, channels, dtype=dtype)
    block_n, first, second, num_warps = tile(channels, dtype.itemsize)
    launch(
        _norm_score_bwd_kernel,
        batch * num_parts,
        x_BNC,
        grad_y_BNC,
        x_BNC if weight_C is None else weight_C,
        x_BNC if bias_C is None else bias_C,
        grad_x_BNC,
        part_BPC,
        *x_BNC.stride(),
        *grad_y_BNC.stride(),
        1 if weight_C is None else weight_C.stride(0),
        1 if bias_C is None else bias_C.stride(0),
        NUM_TOKENS=num_tokens,
        NUM_CHANNELS=channels,
        NUM_PARTS=num_parts,
        PART_TOKENS=PART_TOKENS,
        BLOCK_N=block_n,
        C0=first,
        C1=second,
        EPS=eps,
        HAS_WEIGHT=weight_C is not None,
        HAS_BIAS=bias_C is not None,
        IS_RMS=rms,
        COUNTS_OUTPUT=output,
        num_warps=num_warps,
    )
    if num_parts == 1:
        return grad_x_BNC, part_BPC[:, 0]
    score_BC = x_BNC.new_empty(batch, channels, dtype=dtype)
    launch(
        _add_parts_kernel,
        batch * cdiv(channels, PARTS_BLOCK_C),
        part_BPC,
        score_BC,
        NUM_CHANNELS=channels,
        NUM_PARTS=num_parts,
        BLOCK_C=PARTS_BLOCK_C,
        num_warps=PARTS_WARPS,
    )
    return grad_x_BNC, score_BC
