"""The hidden units of an MLP with a gate on each, ``act(x) * value * gate``, and their backward.

B batch, N tokens, F columns. ``value`` is there for a gated linear unit alone, and the backward has
a gate or none: what is None is not compiled.
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
from vitprune_fast.kernels._launch import cdiv, launch
from vitprune_fast.reference.gated_unit import halves
from vitprune_fast.wide import wide_dtype

# of one program of the forward: each begins again, and an image of 224 pixels is one part
PART_TOKENS = 208


@triton.jit
def _gated_unit_fwd_kernel(
    x_ptr,  # (B, N, F)
    value_ptr,  # (B, N, F) or None
    gate_ptr,  # (F,), adjacent
    out_ptr,  # (B, N, F), contiguous
    num_columns,
    stride_x_b,
    stride_x_n,
    stride_x_f,
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
    if value_ptr is not None:
        value_ptrs = value_ptr + pid_b * stride_value_b + offs_f[None, :] * stride_value_f
        value_ptrs += rows * stride_value_n
    out_ptrs = out_ptr + (pid_b * NUM_TOKENS + rows) * num_columns + offs_f[None, :]
    for n_start in range(0, min(PART_TOKENS, NUM_TOKENS), BLOCK_N):
        mask = (n_start + offs_n < NUM_TOKENS) & mask_f[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(dtype)
        if value_ptr is not None:
            value = tl.load(value_ptrs, mask=mask, other=0.0).to(dtype)
        h, _ = value_and_slope(x, ACTIVATION)
        if value_ptr is not None:
            h *= value
            value_ptrs += step * stride_value_n
        # selected and not multiplied, so that a closed gate stops NaN
        out = tl.where(gate == 0.0, 0.0, h * gate).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs, out, mask=mask)
        x_ptrs += step * stride_x_n
        out_ptrs += step * num_columns


@triton.jit
def _gated_unit_bwd_kernel(
    x_ptr,  # (B, N, F)
    value_ptr,  # (B, N, F) or None
    gate_ptr,  # (F,), adjacent, or None for 1
    grad_ptr,  # (B, N, F)
    grad_x_ptr,  # (B, N, F), columns adjacent, samples one behind the other
    grad_value_ptr,  # the same, or None
    score_ptr,  # (B, F), contiguous
    num_columns,
    stride_x_b,
    stride_x_n,
    stride_x_f,
    stride_value_b,
    stride_value_n,
    stride_value_f,
    stride_grad_b,
    stride_grad_n,
    stride_grad_f,
    stride_out_n,
    # as in the forward
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
    step = tl.full((), BLOCK_N, tl.int64)
    x_ptrs = x_ptr + pid_b * stride_x_b + offs_f[None, :] * stride_x_f + rows * stride_x_n
    grad_ptrs = grad_ptr + pid_b * stride_grad_b + offs_f[None, :] * stride_grad_f
    grad_ptrs += rows * stride_grad_n
    offs_out = (pid_b * NUM_TOKENS + rows) * stride_out_n + offs_f[None, :]
    grad_x_ptrs = grad_x_ptr + offs_out
    if value_ptr is not None:
        value_ptrs = value_ptr + pid_b * stride_value_b + offs_f[None, :] * stride_value_f
        value_ptrs += rows * stride_value_n
        grad_value_ptrs = grad_value_ptr + offs_out
    if gate_ptr is not None:
        gate_ptrs = tl.broadcast_to(gate_ptr + offs_f[None, :], (BLOCK_N, BLOCK_F))
        if value_ptr is None:
            gate = tl.load(gate_ptrs, mask=mask_f[None, :], other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_F), dtype)
    for n_start in range(0, NUM_TOKENS, BLOCK_N):
        mask = (n_start + offs_n < NUM_TOKENS) & mask_f[None, :]
        if gate_ptr is not None and value_ptr is not None:
            # from the cache each time: kept across the loop it would cost registers
            gate = tl.load(gate_ptrs, mask=mask_f[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(dtype)
        if value_ptr is not None:
            value = tl.load(value_ptrs, mask=mask, other=0.0).to(dtype)
        # beyond the last token the gradient is 0, and so is the share of the score
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(dtype)
        act, slope = value_and_slope(x, ACTIVATION)
        share = grad * act if value_ptr is None else grad * value * act
        total += tl.abs(share) if PER_TOKEN else share
        through = grad if gate_ptr is None else grad * gate
        grad_x = through * slope if value_ptr is None else through * value * slope
        if gate_ptr is not None:
            grad_x = tl.where(gate == 0.0, 0.0, grad_x)
        tl.store(grad_x_ptrs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if value_ptr is not None:
            grad_value = through * act
            if gate_ptr is not None:
                grad_value = tl.where(gate == 0.0, 0.0, grad_value)
            tl.store(grad_value_ptrs, grad_value.to(grad_value_ptr.dtype.element_ty), mask=mask)
            value_ptrs += step * stride_value_n
            grad_value_ptrs += step * stride_out_n
        x_ptrs += step * stride_x_n
        grad_ptrs += step * stride_grad_n
        grad_x_ptrs += step * stride_out_n
    tl.store(score_ptr + pid_b * num_columns + offs_f, tl.sum(total, 0), mask=mask_f)


def gated_unit_fwd(
    x_BNF: Tensor, value_BNF: Tensor | None, gate_F: Tensor, activation: str, packed: str | None
) -> Tensor:
    """Launch the forward; see ``vitprune_fast.ops.gated_unit``."""
    if packed is not None:
        x_BNF, value_BNF = halves(x_BNF, packed)
    batch, num_tokens, columns = x_BNF.shape
    out_BNF = x_BNF.new_empty((batch, num_tokens, columns))
    launch(
        _gated_unit_fwd_kernel,
        batch * cdiv(num_tokens, PART_TOKENS) * cdiv(columns, TILE_COLUMNS),
        x_BNF,
        value_BNF,
        gate_F,
        out_BNF,
        columns,
        *x_BNF.stride(),
        *(x_BNF if value_BNF is None else value_BNF).stride(),
        NUM_TOKENS=num_tokens,
        ACTIVATION=activation,
        PART_TOKENS=PART_TOKENS,
        BLOCK_N=TILE_TOKENS,
        BLOCK_F=TILE_COLUMNS,
        num_warps=num_warps(x_BNF.dtype.itemsize),
    )
    return out_BNF


def gated_unit_bwd(
    x_BNF: Tensor,
    value_BNF: Tensor | None,
    gate_F: Tensor | None,
    grad_BNF: Tensor,
    activation: str,
    packed: str | None,
    per_token: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward; see ``vitprune_fast.ops.gated_unit``."""
    batch, num_tokens, columns = x_BNF.shape
    shape = (batch, num_tokens, columns)
    gradients = grad_x_BNF = x_BNF.new_empty(shape if value_BNF is None else (2, *shape))
    grad_value_BNF = None
    if packed is not None:
        columns //= 2
        x_BNF, value_BNF = halves(x_BNF, packed)
        grad_x_BNF, grad_value_BNF = halves(gradients, packed)
    elif value_BNF is not None:
        grad_x_BNF, grad_value_BNF = gradients.unbind()
    dtype = wide_dtype(x_BNF)
    score_BF = x_BNF.new_empty((batch, columns), dtype=dtype)
    launch(
        _gated_unit_bwd_kernel,
        batch * cdiv(columns, TILE_COLUMNS),
        x_BNF,
        value_BNF,
        gate_F,
        grad_BNF,
        grad_x_BNF,
        grad_value_BNF,
        score_BF,
        columns,
        *x_BNF.stride(),
        *(x_BNF if value_BNF is None else value_BNF).stride(),
        *grad_BNF.stride(),
        grad_x_BNF.stride(1),
        NUM_TOKENS=num_tokens,
        ACTIVATION=activation,
        PER_TOKEN=per_token,
        BLOCK_N=TILE_TOKENS,
        BLOCK_F=TILE_COLUMNS,
        num_warps=num_warps(x_BNF.dtype.itemsize, 3 if value_BNF is None else 5),
    )
    return gradients, score_BF
