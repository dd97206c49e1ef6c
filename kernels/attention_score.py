"""Attention, and its backward with the scores of its units: the kernels of ``attention``.

B batch, N tokens, H heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).

The backward's first launch gives what each block of queries adds to a score; a second stage sums
these parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._launch import cdiv, launch
from vitprune_fast.kernels.attention import Attention

# scores that one program of the second stage sums
PARTS_BLOCK = 256


@triton.jit
def _sum_parts_kernel(
    part_ptr,  # (NUM_PARTS, U)
    score_ptr,  # (U,)
    num_units,
    NUM_PARTS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    # in the order of the tokens, whatever the batch
    offs_u = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    mask = offs_u < num_units
    score = tl.zeros((BLOCK_U,), tl.float32)
    for _ in range(NUM_PARTS):
        score += tl.load(part_ptr + offs_u, mask=mask, other=0.0)
        part_ptr += num_units
    tl.store(score_ptr + offs_u, score, mask=mask)


def attention_fwd(qkv_BN3HK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward; see ``vitprune_fast.ops.attention``."""
    out_BNHK, _, lse_BHN = Attention(qkv_BN3HK, scale).forward()
    return out_BNHK, lse_BHN


def _sum_parts(part_PU: Tensor) -> Tensor:
    """Sum of the parts of scores, in order; the parts' own memory when there is one."""
    if part_PU.dim() == 1:
        # not asked for
        return part_PU
    if part_PU.shape[0] == 1 or part_PU.numel() == 0:
        return part_PU[0]
    score_U = torch.empty_like(part_PU[0])
    block = PARTS_BLOCK
    units = score_U.numel()
    launch(
        _sum_parts_kernel,
        cdiv(units, block),
        part_PU,
        score_U,
        units,
        NUM_PARTS=part_PU.shape[0],
        BLOCK_U=block,
    )
    return score_U


def attention_bwd(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    out_BNHK: Tensor,
    lse_BHN: Tensor,
    scale: float,
    per_token: bool,
    qkv: bool,
    head: bool,
    qk_dim: bool,
    v_dim: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch what is asked for; see ``vitprune_fast.ops.attention_score``.

    What is not asked for is returned as a tensor without elements.
    """
    dqkv_BN3HK, *parts = Attention(qkv_BN3HK, scale).backward(
        grad_out_BNHK,
        out_BNHK,
        lse_BHN,
        qkv=qkv,
        head=head,
        qk_dim=qk_dim,
        v_dim=v_dim,
        per_token=per_token,
    )
    head_BH, qk_dim_BHK, v_dim_BHK = map(_sum_parts, parts)
    return dqkv_BN3HK, head_BH, qk_dim_BHK, v_dim_BHK
