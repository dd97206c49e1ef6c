"""A gated linear unit with one more gate on each column, and its backward.

B batch, N tokens, F columns. ``gate`` is the half that goes through the activation, ``unit`` the
gate of each column.
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
def _gated_glu_fwd_kernel(
    gate_ptr,  # (B, N, F)
    value_ptr,  # (B, N, F)
    unit_ptr,  # (F,), adjacent
    out_ptr,  # (B, N, F), contiguous
    num_columns,
    stride_gate_b,
    stride_gate_n,
    stride_gate_f,
    stride_value_b,
    stride_value_n,
    stride_value_f,
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
    dtype = unit_ptr.dtype.element_ty
    offs_f = (pid_f * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    mask_f = offs_f < num_columns
    offs_n = (pid_p * PART_TOKENS + tl.arange(0, BLOCK_N))[:, None]
    rows = offs_n.to(tl.int64)
    # pointers go on from tile to tile, which takes fewer instructions than an offset of 64 bits
    step = tl.full((), BLOCK_N, tl.int64)
    # as wide as a tile, so that every thread loads the gates of its own columns
    unit_ptrs = tl.broadcast_to(unit_ptr + offs_f[None, :], (BLOCK_N, BLOCK_F))
    unit = tl.load(unit_ptrs, mask=mask_f[None, :], other=0.0)
    gate_ptrs = gate_ptr + pid_b * stride_gate_b + offs_f[None, :] * stride_gate_f
    gate_ptrs += rows * stride_gate_n
    value_ptrs = value_ptr + pid_b * stride_value_b + offs_f[None, :] * stride_value_f
    value_ptrs += rows * stride_value_n
    out_ptrs = out_ptr + (pid_b * NUM_TOKENS + rows) * num_columns + offs_f[None, :]
    for n_start in range(0, min(PART_TOKENS, NUM_TOKENS), BLOCK_N):
        mask = (n_start + offs_n < NUM_TOKENS) & mask_f[None, :]
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(dtype)
        value = tl.load(value_ptrs, mask=mask, other=0.0).to(dtype)
        act, _ = value_and_slope(gate, ACTIVATION)
        # selected and not multiplied, so that a closed gate stops NaN
        out = tl.where(unit == 0.0, 0.0, act * value * unit).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs, out, mask=mask)
        gate_ptrs += step * stride_gate_n
        value_ptrs += step * stride_value_n
        out_ptrs += step * num_columns


@triton.jit
def _gated_glu_bwd_kernel(
    gate_ptr,  # (B, N, F)
    value_ptr,  # (B, N, F)
    unit_ptr,  # (F,), adjacent
    grad_ptr,  # (B, N, F)
    grad_gate_ptr,  # (B, N, F), columns adjacent
    grad_value_ptr,  # (B, N, F), columns adjacent, like grad_gate
    grad_unit_ptr,  # (B, F), contiguous
    num_columns,
    stride_gate_b,
    stride_gate_n,
    stride_gate_f,
    stride_value_b,
    stride_value_n,
    stride_value_f,
    stride_grad_b,
    stride_grad_n,
    stride_grad_f,
    stride_out_b,
    stride_out_n,
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
    dtype = unit_ptr.dtype.element_ty
    offs_f = (pid_f * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    mask_f = offs_f < num_columns
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    rows = offs_n.to(tl.int64)
    # pointers go on from tile to tile, which takes fewer instructions than an offset of 64 bits
    step = tl.full((), BLOCK_N, tl.int64)
    gate_ptrs = gate_ptr + pid_b * stride_gate_b + offs_f[None, :] * stride_gate_f
    gate_ptrs += rows * stride_gate_n
    value_ptrs = value_ptr + pid_b * stride_value_b + offs_f[None, :] * stride_value_f
    value_ptrs += rows * stride_value_n
    grad_ptrs = grad_ptr + pid_b * stride_grad_b + offs_f[None, :] * stride_grad_f
    grad_ptrs += rows * stride_grad_n
    offs_out = pid_b * stride_out_b + offs_f[None, :] + rows * stride_out_n
    grad_gate_ptrs = grad_gate_ptr + offs_out
    grad_value_ptrs = grad_value_ptr + offs_out
    unit_ptrs = tl.broadcast_to(unit_ptr + offs_f[None, :], (BLOCK_N, BLOCK_F))
    total = tl.zeros((BLOCK_N, BLOCK_F), dtype)
    for n_start in range(0, NUM_TOKENS, BLOCK_N):
        mask = (n_start + offs_n < NUM_TOKENS) & mask_f[None, :]
        # from the cache each time: kept across the loop it would cost registers
        unit = tl.load(unit_ptrs, mask=mask_f[None, :], other=0.0)
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(dtype)
        value = tl.load(value_ptrs, mask=mask, other=0.0)
        value = value.to(dtype)
        # beyond the last token the gradient is 0, and so is the share of the unit's
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(dtype)
        act, slope = value_and_slope(gate, ACTIVATION)
        total += grad * value * act
        through = grad * unit
        grad_gate = tl.where(unit == 0.0, 0.0, through * value * slope)
        grad_gate = grad_gate.to(grad_gate_ptr.dtype.element_ty)
        tl.store(grad_gate_ptrs, grad_gate, mask=mask)
        grad_value = tl.where(unit == 0.0, 0.0, through * act)
        grad_value = grad_value.to(grad_value_ptr.dtype.element_ty)
        tl.store(grad_value_ptrs, grad_value, mask=mask)
        gate_ptrs += step * stride_gate_n
        value_ptrs += step * stride_value_n
        grad_ptrs += step * stride_grad_n
        grad_gate_ptrs += step * stride_out_n
        grad_value_ptrs += step * stride_out_n
    tl.store(grad_unit_ptr + pid_b * num_columns + offs_f, tl.sum(total, 0), mask=mask_f)


def gated_glu_fwd(gate_BNF: Tensor, value_BNF: Tensor, unit_F: Tensor, activation: str) -> Tensor:
    """Launch the forward; see ``vitprune_fast.ops.gated_glu``."""
    batch, num_tokens, columns = gate_BNF.shape
    out_BNF = gate_BNF.new_empty(gate_BNF.shape)
    if out_BNF.numel() == 0:
        return out_BNF
    blocks = cdiv(num_tokens, PART_TOKENS) * cdiv(columns, TILE_COLUMNS)
    with on_device_of(gate_BNF):
        # one dimension for all blocks: only the first may exceed 65,535
        _gated_glu_fwd_kernel[(batch * blocks,)](
            gate_BNF,
            value_BNF,
            unit_F,
            out_BNF,
            columns,
            *gate_BNF.stride(),
            *value_BNF.stride(),
            NUM_TOKENS=num_tokens,
            ACTIVATION=activation,
            PART_TOKENS=PART_TOKENS,
            BLOCK_N=TILE_TOKENS,
            BLOCK_F=TILE_COLUMNS,
            num_warps=num_warps(gate_BNF.dtype.itemsize),
            # named, because its default is not the same in every Triton
            enable_fp_fusion=True,
        )
    return out_BNF


def gated_glu_bwd(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    unit_F: Tensor,
    grad_BNF: Tensor,
    grad_gate_BNF: Tensor,
    grad_value_BNF: Tensor,
    activation: str,
) -> Tensor:
    """Launch the backward, which fills two gradients; that of the units is ``(B, F)``."""
    batch, num_tokens, columns = gate_BNF.shape
    grad_unit_BF = unit_F.new_empty(batch, columns)
    if grad_unit_BF.numel() == 0:
        return grad_unit_BF
    with on_device_of(gate_BNF):
        _gated_glu_bwd_kernel[(batch * cdiv(columns, TILE_COLUMNS),)](
            gate_BNF,
            value_BNF,
            unit_F,
            grad_BNF,
            grad_gate_BNF,
            grad_value_BNF,
            grad_unit_BF,
            columns,
            *gate_BNF.stride(),
            *value_BNF.stride(),
            *grad_BNF.stride(),
            *grad_gate_BNF.stride()[:2],
            NUM_TOKENS=num_tokens,
            ACTIVATION=activation,
            BLOCK_N=TILE_TOKENS,
            BLOCK_F=TILE_COLUMNS,
            num_warps=num_warps(gate_BNF.dtype.itemsize, tensors=5),
            enable_fp_fusion=True,
        )
    return grad_unit_BF
