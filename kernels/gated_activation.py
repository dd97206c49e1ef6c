"""An activation with a gate on each column, and its backward with the gates' gradient.

B batch, N tokens, F columns.
"""

from __future__ import annotations

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

# of one program of the forward: each begins anew, and an image of 224 pixels is one part
PART_TOKENS = 208


@triton.jit
def _gated_activation_fwd_kernel(
    x_ptr,  # (B, N, F)
    gate_ptr,  # (F,), adjacent
    out_ptr,  # (B, N, F), contiguous
    num_columns,
    stride_x_b,
    stride_x_n,
    stride_x_f,
    # a model has one number of tokens per image size; as a constant it needs no mask where
    # BLOCK_N divides it, and older interpreters cannot run a loop with a run-time bound
    NUM_TOKENS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # one program owns some tokens of BLOCK_F columns of one sample; neighbours share the rows
    blocks_f = tl.cdiv(num_columns, BLOCK_F)
    PARTS: tl.constexpr = (NUM_TOKENS + PART_TOKENS - 1) // PART_TOKENS
    pid_f = tl.program_id(0) % blocks_f
    pid_p = (tl.program_id(0) // blocks_f) % PARTS
    pid_b = (tl.program_id(0) // blocks_f // PARTS).to(tl.int64)
    dtype = gate_ptr.dtype.element_ty
    offs_f = (pid_f * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    mask_f = offs_f < num_columns
    offs_n = (pid_p * PART_TOKENS + tl.arange(0, BLOCK_N))[:, None]
    rows = offs_n.to(tl.int64)
    # pointers go on from tile to tile, which takes fewer instructions than an offset of 64 bits
    step = tl.full((), BLOCK_N, tl.int64)
    # as wide as a tile, so that every thread loads the gates of its own columns
    gate_ptrs = tl.broadcast_to(gate_ptr + offs_f[None, :], (BLOCK_N, BLOCK_F))
    gate = tl.load(gate_ptrs, mask=mask_f[None, :], other=0.0)
    x_ptrs = x_ptr + pid_b * stride_x_b + offs_f[None, :] * stride_x_f + rows * stride_x_n
    out_ptrs = out_ptr + (pid_b * NUM_TOKENS + rows) * num_columns + offs_f[None, :]
    for n_start in range(0, min(PART_TOKENS, NUM_TOKENS), BLOCK_N):
        mask = (n_start + offs_n < NUM_TOKENS) & mask_f[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(dtype)
        value, _ = value_and_slope(x, ACTIVATION)
        # selected and not multiplied, so that a closed gate stops NaN
        out = tl.where(gate == 0.0, 0.0, value * gate).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs, out, mask=mask)
        x_ptrs += step * stride_x_n
        out_ptrs += step * num_columns


@triton.jit
def _gated_activation_bwd_kernel(
    x_ptr,  # (B, N, F)
    gate_ptr,  # (F,), adjacent
    grad_ptr,  # (B, N, F)
    grad_x_ptr,  # (B, N, F), contiguous
    grad_gate_ptr,  # (B, F), contiguous
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
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # one program owns BLOCK_F columns of one sample and walks all its tokens in order
    num_blocks = tl.cdiv(num_columns, BLOCK_F)
    pid_b = (tl.program_id(0) // num_blocks).to(tl.int64)
    pid_f = tl.program_id(0) % num_blocks
    dtype = gate_ptr.dtype.element_ty
    offs_f = (pid_f * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    mask_f = offs_f < num_columns
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    rows = offs_n.to(tl.int64)
    # pointers go on from tile to tile, which takes fewer instructions than an offset of 64 bits
    step = tl.full((), BLOCK_N, tl.int64)
    x_ptrs = x_ptr + pid_b * stride_x_b + offs_f[None, :] * stride_x_f + rows * stride_x_n
    grad_ptrs = grad_ptr + pid_b * stride_g_b + offs_f[None, :] * stride_g_f + rows * stride_g_n
    grad_x_ptrs = grad_x_ptr + (pid_b * NUM_TOKENS + rows) * num_columns + offs_f[None, :]
    gate_ptrs = tl.broadcast_to(gate_ptr + offs_f[None, :], (BLOCK_N, BLOCK_F))
    gate = tl.load(gate_ptrs, mask=mask_f[None, :], other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_F), dtype)
    for n_start in range(0, NUM_TOKENS, BLOCK_N):
        mask = (n_start + offs_n < NUM_TOKENS) & mask_f[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(dtype)
        # beyond the last token the gradient is 0, and so is the share of the gate's
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(dtype)
        value, slope = value_and_slope(x, ACTIVATION)
        total += value * grad
        grad_x = tl.where(gate == 0.0, 0.0, grad * gate * slope)
        tl.store(grad_x_ptrs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        x_ptrs += step * stride_x_n
        grad_ptrs += step * stride_g_n
        grad_x_ptrs += step * num_columns
    tl.store(grad_gate_ptr + pid_b * num_columns + offs_f, tl.sum(total, 0), mask=mask_f)


def gated_activation_fwd(x_BNF: Tensor, gate_F: Tensor, activation: str) -> Tensor:
    """Launch the forward; see ``vitprune_fast.ops.gated_activation``."""
    batch, num_tokens, columns = x_BNF.shape
    out_BNF = x_BNF.new_empty(x_BNF.shape)
    if out_BNF.numel() == 0:
        return out_BNF
    blocks = cdiv(num_tokens, PART_TOKENS) * cdiv(columns, TILE_COLUMNS)
    with on_device_of(x_BNF):
        # one dimension for all blocks: only the first may exceed 65,535
        _gated_activation_fwd_kernel[(batch * blocks,)](
            x_BNF,
            gate_F,
            out_BNF,
            columns,
            *x_BNF.stride(),
            NUM_TOKENS=num_tokens,
            ACTIVATION=activation,
            PART_TOKENS=PART_TOKENS,
            BLOCK_N=TILE_TOKENS,
            BLOCK_F=TILE_COLUMNS,
            num_warps=num_warps(x_BNF.dtype.itemsize),
            # named, because its default is not the same in every Triton
            enable_fp_fusion=True,
        )
    return out_BNF


def gated_activation_bwd(
    x_BNF: Tensor, gate_F: Tensor, grad_BNF: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Launch the backward; the gates' gradient is still apart by sample, ``(B, F)``."""
    batch, num_tokens, columns = x_BNF.shape
    grad_x_BNF = x_BNF.new_empty(x_BNF.shape)
    grad_gate_BF = gate_F.new_empty(batch, columns)
    if grad_gate_BF.numel() == 0:
        return grad_x_BNF, grad_gate_BF
    with on_device_of(x_BNF):
        _gated_activation_bwd_kernel[(batch * cdiv(columns, TILE_COLUMNS),)](
            x_BNF,
            gate_F,
            grad_BNF,
            grad_x_BNF,
            grad_gate_BF,
            columns,
            *x_BNF.stride(),
            *grad_BNF.stride(),
            NUM_TOKENS=num_tokens,
            ACTIVATION=activation,
            BLOCK_N=TILE_TOKENS,
            BLOCK_F=TILE_COLUMNS,
            num_warps=num_warps(x_BNF.dtype.itemsize),
            enable_fp_fusion=True,
        )
    return grad_x_BNF, grad_gate_BF
