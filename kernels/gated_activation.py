"""An activation with a gate on each column, and its backward with the gates' gradient.

B batch, N tokens, F columns.
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
def _gated_activation_fwd_kernel(
    x_ptr,  # (B, N, F)
    gate_ptr,  # (F,), adjacent
    out_ptr,  # (B, N, F), contiguous
    num_tokens,
    num_columns,
    stride_x_b,
    stride_x_n,
    stride_x_f,
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
    dtype = gate_ptr.dtype.element_ty
    offs_f = (pid_f * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    mask_f = offs_f < num_columns
    mask = (offs_n < num_tokens) & mask_f[None, :]
    gate = tl.load(gate_ptr + offs_f, mask=mask_f, other=0.0)[None, :]
    x_row = x_ptr + pid_b * stride_x_b + offs_f * stride_x_f
    x = tl.load(x_row[None, :] + offs_n * stride_x_n, mask=mask, other=0.0).to(dtype)
    value, _ = value_and_slope(x, ACTIVATION)
    # selected and not multiplied, so that a closed gate stops NaN
    out = tl.where(gate == 0.0, 0.0, value * gate).to(out_ptr.dtype.element_ty)
    out_row = out_ptr + pid_b * num_tokens * num_columns + offs_f
    tl.store(out_row[None, :] + offs_n * num_columns, out, mask=mask)


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
    x_row = x_ptr + pid_b * stride_x_b + offs_f * stride_x_f
    grad_row = grad_ptr + pid_b * stride_g_b + offs_f * stride_g_f
    grad_x_row = grad_x_ptr + pid_b * NUM_TOKENS * num_columns + offs_f
    total = tl.zeros((BLOCK_N, BLOCK_F), dtype)
    for n_start in range(0, NUM_TOKENS, BLOCK_N):
        offs_n = (n_start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (offs_n < NUM_TOKENS) & mask_f[None, :]
        # from the cache each time: kept across the loop it would cost registers
        gate = tl.load(gate_ptr + offs_f, mask=mask_f, other=0.0)[None, :]
        x = tl.load(x_row[None, :] + offs_n * stride_x_n, mask=mask, other=0.0).to(dtype)
        # beyond the last token the gradient is 0, and so is the share of the gate's
        grad = tl.load(grad_row[None, :] + offs_n * stride_g_n, mask=mask, other=0.0).to(dtype)
        value, slope = value_and_slope(x, ACTIVATION)
        total += value * grad
        grad_x = tl.where(gate == 0.0, 0.0, grad * gate * slope)
        grad_x = grad_x.to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_row[None, :] + offs_n * num_columns, grad_x, mask=mask)
    tl.store(grad_gate_ptr + pid_b * num_columns + offs_f, tl.sum(total, 0), mask=mask_f)


def gated_activation_fwd(x_BNF: Tensor, gate_F: Tensor, activation: str) -> Tensor:
    """Launch the forward; see ``vitprune_fast.ops.gated_activation``."""
    batch, num_tokens, columns = x_BNF.shape
    out_BNF = x_BNF.new_empty(x_BNF.shape)
    if out_BNF.numel() == 0:
        return out_BNF
    blocks = triton.cdiv(num_tokens, TILE_TOKENS) * triton.cdiv(columns, TILE_COLUMNS)
    with on_device_of(x_BNF):
        # one dimension for all blocks: only the first may exceed 65,535
        _gated_activation_fwd_kernel[(batch * blocks,)](
            x_BNF,
            gate_F,
            out_BNF,
            num_tokens,
            columns,
            *x_BNF.stride(),
            ACTIVATION=activation,
            BLOCK_N=TILE_TOKENS,
            BLOCK_F=TILE_COLUMNS,
            num_warps=NUM_WARPS,
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
        _gated_activation_bwd_kernel[(batch * triton.cdiv(columns, TILE_COLUMNS),)](
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
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return grad_x_BNF, grad_gate_BF
