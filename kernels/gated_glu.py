"""A gated linear unit with one more gate on each column, and its backward.

B batch, N tokens, F columns. ``gate`` is the half that goes through the activation, ``unit`` the
gate of each column.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._activations import value_and_slope
from vitprune_fast.kernels._launch import on_device_of

# columns of one tile: 128 of them are 256 bytes of a bf16 row, one full request of a warp
TILE_COLUMNS = 128
TILE_TOKENS = 16
# eight elements for each thread: few registers, hence many programs at once
NUM_WARPS = 8


@triton.jit
def _gated_glu_fwd_kernel(
    gate_ptr,  # (B, N, F)
    value_ptr,  # (B, N, F)
    unit_ptr,  # (F,), adjacent
    out_ptr,  # (B, N, F), contiguous
    num_tokens,
    num_columns,
    stride_gate_b,
    stride_gate_n,
    stride_gate_f,
    stride_value_b,
    stride_value_n,
    stride_value_f,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # one program owns one tile of one sample; neighbours share the rows
    blocks_f = tl.cdiv(num_columns, BLOCK_F)
    blocks_n = tl.cdiv(num_tokens, BLOCK_N)
    pid_f = tl.program_id(0) % blocks_f
    pid_n = (tl.program_id(0) // blocks_f) % blocks_n
    pid_b = (tl.program_id(0) // (blocks_f * blocks_n)).to(tl.int64)
    dtype = unit_ptr.dtype.element_ty
    offs_f = (pid_f * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    mask_f = offs_f < num_columns
    mask = (offs_n < num_tokens) & mask_f[None, :]
    unit = tl.load(unit_ptr + offs_f, mask=mask_f, other=0.0)[None, :]
    gate_row = gate_ptr + pid_b * stride_gate_b + offs_f * stride_gate_f
    value_row = value_ptr + pid_b * stride_value_b + offs_f * stride_value_f
    gate = tl.load(gate_row[None, :] + offs_n * stride_gate_n, mask=mask, other=0.0).to(dtype)
    value = tl.load(value_row[None, :] + offs_n * stride_value_n, mask=mask, other=0.0).to(dtype)
    act, _ = value_and_slope(gate, ACTIVATION)
    # selected and not multiplied, so that a closed gate stops NaN
    out = tl.where(unit == 0.0, 0.0, act * value * unit).to(out_ptr.dtype.element_ty)
    out_row = out_ptr + pid_b * num_tokens * num_columns + offs_f
    tl.store(out_row[None, :] + offs_n * num_columns, out, mask=mask)


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
    gate_row = gate_ptr + pid_b * stride_gate_b + offs_f * stride_gate_f
    value_row = value_ptr + pid_b * stride_value_b + offs_f * stride_value_f
    grad_row = grad_ptr + pid_b * stride_grad_b + offs_f * stride_grad_f
    grad_gate_row = grad_gate_ptr + pid_b * stride_out_b + offs_f
    grad_value_row = grad_value_ptr + pid_b * stride_out_b + offs_f
    total = tl.zeros((BLOCK_N, BLOCK_F), dtype)
    for n_start in range(0, NUM_TOKENS, BLOCK_N):
        offs_n = (n_start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (offs_n < NUM_TOKENS) & mask_f[None, :]
        # from the cache each time: kept across the loop it would cost registers
        unit = tl.load(unit_ptr + offs_f, mask=mask_f, other=0.0)[None, :]
        gate = tl.load(gate_row[None, :] + offs_n * stride_gate_n, mask=mask, other=0.0).to(dtype)
        value = tl.load(value_row[None, :] + offs_n * stride_value_n, mask=mask, other=0.0)
        value = value.to(dtype)
        # beyond the last token the gradient is 0, and so is the share of the unit's
        grad = tl.load(grad_row[None, :] + offs_n * stride_grad_n, mask=mask, other=0.0).to(dtype)
        act, slope = value_and_slope(gate, ACTIVATION)
        total += grad * value * act
        through = grad * unit
        offs_out = offs_n * stride_out_n
        grad_gate = tl.where(unit == 0.0, 0.0, through * value * slope)
        grad_gate = grad_gate.to(grad_gate_ptr.dtype.element_ty)
        tl.store(grad_gate_row[None, :] + offs_out, grad_gate, mask=mask)
        grad_value = tl.where(unit == 0.0, 0.0, through * act)
        grad_value = grad_value.to(grad_value_ptr.dtype.element_ty)
        tl.store(grad_value_row[None, :] + offs_out, grad_value, mask=mask)
    tl.store(grad_unit_ptr + pid_b * num_columns + offs_f, tl.sum(total, 0), mask=mask_f)


def gated_glu_fwd(gate_BNF: Tensor, value_BNF: Tensor, unit_F: Tensor, activation: str) -> Tensor:
    """Launch the forward; see ``vitprune_fast.ops.gated_glu``."""
    batch, num_tokens, columns = gate_BNF.shape
    out_BNF = gate_BNF.new_empty(gate_BNF.shape)
    if out_BNF.numel() == 0:
        return out_BNF
    blocks = triton.cdiv(num_tokens, TILE_TOKENS) * triton.cdiv(columns, TILE_COLUMNS)
    with on_device_of(gate_BNF):
        # one dimension for all blocks: only the first may exceed 65,535
        _gated_glu_fwd_kernel[(batch * blocks,)](
            gate_BNF,
            value_BNF,
            unit_F,
            out_BNF,
            num_tokens,
            columns,
            *gate_BNF.stride(),
            *value_BNF.stride(),
            ACTIVATION=activation,
            BLOCK_N=TILE_TOKENS,
            BLOCK_F=TILE_COLUMNS,
            num_warps=NUM_WARPS,
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
        _gated_glu_bwd_kernel[(batch * triton.cdiv(columns, TILE_COLUMNS),)](
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
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return grad_unit_BF
