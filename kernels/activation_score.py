"""Backward of an activation, and the per-sample sum of output x gradient over tokens.

B batch, N tokens, F columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._activations import (
    TILE_COLUMNS,
    TILE_TOKENS,
    num_warps,
    value_and_slope,
)
from vitprune_fast.kernels._launch import cdiv, on_device_of


@triton.jit
def _activation_score_bwd_kernel(
    x_ptr,  # (B, N, F)
    grad_ptr,  # (B, N, F)
    grad_x_ptr,  # (B, N, F), contiguous
    score_ptr,  # (B, F), contiguous
    num_columns,
    stride_x_b,
    stride_x_n,
    stride_x_f,
    stride_g_b,
    stride_g_n,
    stride_g_f,
    # a model has one number of tokens per image size; as a constant it needs no mask where
    # BLOCK_N divides it, and older interpreters cannot run a loop with a run-time bound
    NUM_TOKENS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # one program owns BLOCK_F columns of one sample and walks all its tokens in order
    num_blocks = tl.cdiv(num_columns, BLOCK_F)
    pid_b = (tl.program_id(0) // num_blocks).to(tl.int64)
    pid_f = tl.program_id(0) % num_blocks
    dtype = score_ptr.dtype.element_ty
    offs_f = (pid_f * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    mask_f = offs_f < num_columns
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    rows = offs_n.to(tl.int64)
    # pointers go on from tile to tile, which takes fewer instructions than an offset of 64 bits
    step = tl.full((), BLOCK_N, tl.int64)
    x_ptrs = x_ptr + pid_b * stride_x_b + offs_f[None, :] * stride_x_f + rows * stride_x_n
    grad_ptrs = grad_ptr + pid_b * stride_g_b + offs_f[None, :] * stride_g_f + rows * stride_g_n
    grad_x_ptrs = grad_x_ptr + (pid_b * NUM_TOKENS + rows) * num_columns + offs_f[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_F), dtype)
    for n_start in range(0, NUM_TOKENS, BLOCK_N):
        mask = (n_start + offs_n < NUM_TOKENS) & mask_f[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(dtype)
        # beyond the last token the gradient is 0, and so is the share of the score
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(dtype)
        value, slope = value_and_slope(x, ACTIVATION)
        grad_x = (grad * slope).to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptrs, grad_x, mask=mask)
        share = value * grad
        total += tl.abs(share) if PER_TOKEN else share
        x_ptrs += step * stride_x_n
        grad_ptrs += step * stride_g_n
        grad_x_ptrs += step * num_columns
    tl.store(score_ptr + pid_b * num_columns + offs_f, tl.sum(total, 0), mask=mask_f)


def activation_score_bwd(
    x_BNF: Tensor, grad_BNF: Tensor, activation: str, per_token: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; see ``vitprune_fast.ops.activation_score``."""
    batch, num_tokens, columns = x_BNF.shape
    dtype = torch.float64 if x_BNF.dtype == torch.float64 else torch.float32
    grad_x_BNF = x_BNF.new_empty(x_BNF.shape)
    score_BF = x_BNF.new_empty(batch, columns, dtype=dtype)
    if score_BF.numel() == 0:
        return grad_x_BNF, score_BF
    # one dimension for samples and blocks: only the first may exceed 65,535
    grid = (batch * cdiv(columns, TILE_COLUMNS),)
    with on_device_of(x_BNF):
        _activation_score_bwd_kernel[grid](
            x_BNF,
            grad_BNF,
            grad_x_BNF,
            score_BF,
            columns,
            *x_BNF.stride(),
            *grad_BNF.stride(),
            NUM_TOKENS=num_tokens,
            ACTIVATION=activation,
            PER_TOKEN=per_token,
            BLOCK_N=TILE_TOKENS,
            BLOCK_F=TILE_COLUMNS,
            num_warps=num_warps(x_BNF.dtype.itemsize),
            # named, because its default is not the same in every Triton
            enable_fp_fusion=True,
        )
    return grad_x_BNF, score_BF
