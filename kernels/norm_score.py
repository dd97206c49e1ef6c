"""Backward of LayerNorm or RMSNorm, fused with the per-sample score of removing each channel.

B batch, N tokens, C channels, P parts of the tokens of one sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._launch import on_device_of

# tokens of one program: enough programs for a GPU from few samples, and short sums
PART_TOKENS = 32
# numbers of one tile, whole rows of it: 16 of each tensor in a thread of 4 warps
TILE_NUMBERS = 2048
# channels of one program of the second stage, 4 in a thread
PARTS_BLOCK_C = 256
PARTS_WARPS = 2


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
    BLOCK_C: tl.constexpr,
    # a run-time number would be rounded to fp32
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_RMS: tl.constexpr,
    COUNTS_OUTPUT: tl.constexpr,
):
    # one program owns one part of the tokens of one sample; it holds whole rows, BLOCK_N at a time
    pid_b = (tl.program_id(0) // NUM_PARTS).to(tl.int64)
    pid_p = tl.program_id(0) % NUM_PARTS
    dtype = part_ptr.dtype.element_ty
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < NUM_CHANNELS
    columns = offs_c.to(tl.int64)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + columns * stride_weight, mask=mask_c, other=0.0).to(dtype)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns * stride_bias, mask=mask_c, other=0.0).to(dtype)
    x_row = x_ptr + pid_b * stride_x_b + (columns * stride_x_c)[None, :]
    grad_y_row = grad_y_ptr + pid_b * stride_g_b + (columns * stride_g_c)[None, :]
    grad_x_row = grad_x_ptr + pid_b * NUM_TOKENS * NUM_CHANNELS + columns[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype)
    for n_start in range(0, PART_TOKENS, BLOCK_N):
        offs_n = (pid_p * PART_TOKENS + n_start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask_n = offs_n < NUM_TOKENS
        mask = mask_n & mask_c[None, :]
        x = tl.load(x_row + offs_n * stride_x_n, mask=mask, other=0.0).to(dtype)
        grad_y = tl.load(grad_y_row + offs_n * stride_g_n, mask=mask, other=0.0).to(dtype)
        if IS_RMS:
            centred = x
        else:
            mean = tl.sum(x, 1)[:, None] / NUM_CHANNELS
            centred = tl.where(mask, x - mean, 0.0)
        variance = tl.sum(centred * centred, 1)[:, None] / NUM_CHANNELS
        # a row that is only padding has no variance, and must not divide by an eps of 0
        scale = tl.rsqrt(tl.where(mask_n, variance + EPS, 1.0))
        x_hat = centred * scale
        gradient = grad_y
        if HAS_WEIGHT:
            gradient = grad_y * weight[None, :]
        c1 = tl.sum(gradient * x_hat, 1)[:, None] / NUM_CHANNELS
        grad_x = gradient - x_hat * c1
        share = (variance * scale * scale - x_hat * x_hat) * (c1 * 0.5)
        if not IS_RMS:
            c2 = tl.sum(gradient, 1)[:, None] / NUM_CHANNELS
            grad_x -= c2
            share -= x_hat * c2
        if COUNTS_OUTPUT:
            y = x_hat
            if HAS_WEIGHT:
                y = y * weight[None, :]
            if HAS_BIAS:
                y = y + bias[None, :]
            share += y * grad_y
        total += share
        grad_x = grad_x * scale
        tl.store(
            grad_x_row + offs_n * NUM_CHANNELS, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask
        )
    score = tl.sum(total, 0)
    part_row = part_ptr + (pid_b * NUM_PARTS + pid_p) * NUM_CHANNELS
    tl.store(part_row + columns, score, mask=mask_c)


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


def tile(channels: int, itemsize: int) -> tuple[int, int, int]:
    """Tokens and channels of one tile, and the warps that share it."""
    numbers = TILE_NUMBERS // 2 if itemsize == 8 else TILE_NUMBERS
    block_c = max(16, triton.next_power_of_2(channels))
    block_n = max(1, min(PART_TOKENS, numbers // block_c))
    return block_n, block_c, max(4, min(16, 4 * block_c // numbers))


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
    dtype = torch.float64 if x_BNC.dtype == torch.float64 else torch.float32
    grad_x_BNC = x_BNC.new_empty(x_BNC.shape)
    if grad_x_BNC.numel() == 0:
        return grad_x_BNC, x_BNC.new_zeros(batch, channels, dtype=dtype)
    num_parts = triton.cdiv(num_tokens, PART_TOKENS)
    part_BPC = x_BNC.new_empty(batch, num_parts, channels, dtype=dtype)
    block_n, block_c, num_warps = tile(channels, dtype.itemsize)
    with on_device_of(x_BNC):
        _norm_score_bwd_kernel[(batch * num_parts,)](
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
            BLOCK_C=block_c,
            EPS=eps,
            HAS_WEIGHT=weight_C is not None,
            HAS_BIAS=bias_C is not None,
            IS_RMS=rms,
            COUNTS_OUTPUT=output,
            num_warps=num_warps,
            # named, because its default is not the same in every Triton
            enable_fp_fusion=True,
        )
        if num_parts == 1:
            return grad_x_BNC, part_BPC[:, 0]
        score_BC = x_BNC.new_empty(batch, channels, dtype=dtype)
        _add_parts_kernel[(batch * triton.cdiv(channels, PARTS_BLOCK_C),)](
            part_BPC,
            score_BC,
            NUM_CHANNELS=channels,
            NUM_PARTS=num_parts,
            BLOCK_C=PARTS_BLOCK_C,
            num_warps=PARTS_WARPS,
            enable_fp_fusion=True,
        )
    return grad_x_BNC, score_BC
