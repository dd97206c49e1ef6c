"""Per-sample sum of activation x gradient over tokens and the columns of each unit.

Or, per token, the sum over tokens of the magnitude of what the columns add up to.

B batch, N tokens, F columns, K columns per unit, U = F / K units.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._launch import cdiv, launch, next_power_of_2
from vitprune_fast.wide import wide_dtype

# columns of one tile: 128 of them are 256 bytes of a bf16 row, one full request of a warp
TILE_COLUMNS = 128
TILE_TOKENS = 8


@triton.jit
def _products(activation_ptrs, gradient_ptrs, mask, dtype: tl.constexpr):
    """Activation x gradient of one tile."""
    activation = tl.load(activation_ptrs, mask=mask, other=0.0)
    gradient = tl.load(gradient_ptrs, mask=mask, other=0.0)
    return activation.to(dtype) * gradient.to(dtype)


@triton.jit
def _taylor_score_fwd_kernel(
    activation_ptr,  # (B, N, F)
    gradient_ptr,  # (B, N, F)
    score_ptr,  # (B, U)
    num_units,
    stride_a_b,
    stride_a_n,
    stride_a_f,
    stride_g_b,
    stride_g_n,
    stride_g_f,
    # a model has one number of tokens per image size; as a constant it needs no mask where
    # BLOCK_N divides it, and older interpreters cannot run a loop with a run-time bound
    NUM_TOKENS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    # one program owns BLOCK_U units of one sample and walks all its tokens in order
    num_blocks = tl.cdiv(num_units, BLOCK_U)
    pid_b = (tl.program_id(0) // num_blocks).to(tl.int64)
    pid_u = tl.program_id(0) % num_blocks
    dtype = score_ptr.dtype.element_ty
    offs_u = pid_u * BLOCK_U + tl.arange(0, BLOCK_U)
    # a tile row is BLOCK_U units of BLOCK_K columns, kept flat so that neighbours load together
    offs_tile = tl.arange(0, BLOCK_U * BLOCK_K)
    tile_u = pid_u * BLOCK_U + offs_tile // BLOCK_K
    activation_ptr += pid_b * stride_a_b
    gradient_ptr += pid_b * stride_g_b
    score = tl.zeros((BLOCK_U,), dtype)
    if PER_TOKEN:
        # a token's share of a unit is complete before its magnitude is taken
        shares = tl.zeros((BLOCK_N, BLOCK_U), dtype)
        for n_start in range(0, NUM_TOKENS, BLOCK_N):
            offs_n = (n_start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
            share = tl.zeros((BLOCK_N, BLOCK_U), dtype)
            for k_start in range(0, GROUP_SIZE, BLOCK_K):
                tile_k = k_start + offs_tile % BLOCK_K
                offs_f = (tile_u * GROUP_SIZE + tile_k).to(tl.int64)
                mask_f = (tile_u < num_units) & (tile_k < GROUP_SIZE)
                mask = (offs_n < NUM_TOKENS) & mask_f[None, :]
                product = _products(
                    activation_ptr + offs_n * stride_a_n + (offs_f * stride_a_f)[None, :],
                    gradient_ptr + offs_n * stride_g_n + (offs_f * stride_g_f)[None, :],
                    mask,
                    dtype,
                )
                share += tl.sum(tl.reshape(product, (BLOCK_N, BLOCK_U, BLOCK_K)), 2)
            shares += tl.abs(share)
        score = tl.sum(shares, 0)
    else:
        for k_start in range(0, GROUP_SIZE, BLOCK_K):
            tile_k = k_start + offs_tile % BLOCK_K
            offs_f = (tile_u * GROUP_SIZE + tile_k).to(tl.int64)
            mask_f = (tile_u < num_units) & (tile_k < GROUP_SIZE)
            total = tl.zeros((BLOCK_N, BLOCK_U * BLOCK_K), dtype)
            for n_start in range(0, NUM_TOKENS, BLOCK_N):
                offs_n = (n_start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
                mask = (offs_n < NUM_TOKENS) & mask_f[None, :]
                total += _products(
                    activation_ptr + offs_n * stride_a_n + (offs_f * stride_a_f)[None, :],
                    gradient_ptr + offs_n * stride_g_n + (offs_f * stride_g_f)[None, :],
                    mask,
                    dtype,
                )
            column_score = tl.reshape(tl.sum(total, 0), (BLOCK_U, BLOCK_K))
            score += tl.sum(column_score, 1)
    tl.store(score_ptr + pid_b * num_units + offs_u, score, mask=offs_u < num_units)


def tile(group_size: int) -> tuple[int, int]:
    """Units and columns per unit of one tile; their product is TILE_COLUMNS."""
    block_k = min(next_power_of_2(group_size), TILE_COLUMNS)
    return TILE_COLUMNS // block_k, block_k


def taylor_score_fwd(
    activation_BNF: Tensor, gradient_BNF: Tensor, group_size: int, per_token: bool
) -> Tensor:
    """Launch the kernel; see ``vitprune_fast.ops.taylor_score``."""
    batch, num_tokens, columns = activation_BNF.shape
    num_units = columns // group_size
    dtype = wide_dtype(activation_BNF)
    score_BU = activation_BNF.new_empty(batch, num_units, dtype=dtype)
    block_u, block_k = tile(group_size)
    launch(
        _taylor_score_fwd_kernel,
        batch * cdiv(num_units, block_u),
        activation_BNF,
        gradient_BNF,
        score_BU,
        num_units,
        *activation_BNF.stride(),
        *gradient_BNF.stride(),
        NUM_TOKENS=num_tokens,
        GROUP_SIZE=group_size,
        BLOCK_N=TILE_TOKENS,
        BLOCK_U=block_u,
        BLOCK_K=block_k,
        PER_TOKEN=per_token,
        num_warps=4,
    )
    return score_BU
