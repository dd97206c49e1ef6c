"""Backward of a gated linear unit, and the per-sample sum of output x gradient over tokens.

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
def _glu_score_bwd_kernel(
    gate_ptr,  # (B, N, F)
    value_ptr,  # (B, N, F)
    grad_ptr,  # (B, N, F)
    grad_gate_ptr,  # (B, N, F), columns adjacent
    grad_value_ptr,  # (B, N, F), columns adjacent, like grad_gate
    score_ptr,  # (B, F), contiguous
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
    gate_ptrs = gate_ptr + pid_b * stride_gate_b + offs_f[None, :] * stride_gate_f
    gate_ptrs += rows * stride_gate_n
    value_ptrs = value_ptr + pid_b * stride_value_b + offs_f[None, :] * stride_value_f
    value_ptrs += rows * stride_value_n
    grad_ptrs = grad_ptr + pid_b * stride_grad_b + offs_f[None, :] * stride_grad_f
    grad_ptrs += rows * stride_grad_n
    offs_out = pid_b * stride_out_b + offs_f[None, :] + rows * stride_out_n
    grad_gate_ptrs = grad_gate_ptr + offs_out
    grad_value_ptrs = grad_value_ptr + offs_out
    total = tl.zeros((BLOCK_N, BLOCK_F), dtype)
    for n_start in range(0, NUM_TOKENS, BLOCK_N):
        mask = (n_start + offs_n < NUM_TOKENS) & mask_f[None, :]
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(dtype)
        value = tl.load(value_ptrs, mask=mask, other=0.0)
        # beyond the last token the gradient is 0, and so is the share of the score
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(dtype)
        act, slope = value_and_slope(gate, ACTIVATION)
        through_value = grad * value.to(dtype)
        grad_gate = (through_value * slope).to(grad_gate_ptr.dtype.element_ty)
        tl.store(grad_gate_ptrs, grad_gate, mask=mask)
        grad_value = (grad * act).to(grad_value_ptr.dtype.element_ty)
        tl.store(grad_value_ptrs, grad_value, mask=mask)
        share = through_value * act
        total += tl.abs(share) if PER_TOKEN else share
        gate_ptrs += step * stride_gate_n
        value_ptrs += step * stride_value_n
        grad_ptrs += step * stride_grad_n
        grad_gate_ptrs += step * stride_out_n
        grad_value_ptrs += step * stride_out_n
    tl.store(score_ptr + pid_b * num_columns + offs_f, tl.sum(total, 0), mask=mask_f)


def glu_score_bwd(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    grad_BNF: Tensor,
    grad_gate_BNF: Tensor,
    grad_value_BNF: Tensor,
    activation: str,
    per_token: bool,
) -> Tensor:
    """Launch the kernel, which fills the two gradients; see ``vitprune_fast.ops.glu_score``."""
    batch, num_tokens, columns = gate_BNF.shape
    dtype = torch.float64 if gate_BNF.dtype == torch.float64 else torch.float32
    score_BF = gate_BNF.new_empty(batch, columns, dtype=dtype)
    if score_BF.numel() == 0:
        return score_BF
    # one dimension for samples and blocks: only the first may exceed 65,535
    grid = (batch * cdiv(columns, TILE_COLUMNS),)
    with on_device_of(gate_BNF):
        _glu_score_bwd_kernel[grid](
            gate_BNF,
            value_BNF,
            grad_BNF,
            grad_gate_BNF,
            grad_value_BNF,
            score_BF,
            columns,
            *gate_BNF.stride(),
            *value_BNF.stride(),
            *grad_BNF.stride(),
            *grad_gate_BNF.stride()[:2],
            NUM_TOKENS=num_tokens,
            ACTIVATION=activation,
            PER_TOKEN=per_token,
            BLOCK_N=TILE_TOKENS,
            BLOCK_F=TILE_COLUMNS,
            num_warps=num_warps(gate_BNF.dtype.itemsize, tensors=5),
            # named, because its default is not the same in every Triton
            enable_fp_fusion=True,
        )
    return score_BF
