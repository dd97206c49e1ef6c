"""Attention with a gate per head over live heads: launches of the kernels of ``attention``.

B batch, N tokens, H heads, L live heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast.kernels.attention import Attention


def gated_attention_fwd(
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None,
    mask_BN: Tensor | None,
    live: list[int],
    scale: float,
    compact: bool,
    raw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward; see ``vitprune_fast.ops.gated_attention``.

    Returns:
        The output; the output before the gate for live heads, without elements unless ``raw``; and
        the logarithm of each row's normaliser, ``(B, L, N)``.
    """
    return Attention(qkv_BN3HK, scale, gate_H, mask_BN, live, compact).forward(raw)


def gated_attention_bwd(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None,
    mask_BN: Tensor | None,
    out_BNHK: Tensor,
    lse_BLN: Tensor,
    live: list[int],
    scale: float,
    compact: bool,
    raw: bool,
    qkv: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward; see ``vitprune_fast.ops.gated_attention``.

    Returns:
        The gradient of packed qkv, without elements unless ``qkv``; and that of the gates, ``(H,)``
        fp32, without elements unless ``raw``.
    """
    attention = Attention(qkv_BN3HK, scale, gate_H, mask_BN, live, compact)
    blocks = (attention.num_query_blocks, attention.batch, attention.num_heads)
    # the parts of dead heads stay 0
    gate_PBH = qkv_BN3HK.new_zeros(blocks if raw else (0,), dtype=torch.float32)
    dqkv_BN3HK = qkv_BN3HK.new_empty(qkv_BN3HK.shape if qkv else (0,))
    delta_BLN, none = torch.empty_like(lse_BLN), gate_PBH[:0]
    attention.backward_queries(
        grad_out_BNHK, out_BNHK, lse_BLN, delta_BLN, dqkv_BN3HK, gate_PBH, none, none, raw=raw
    )
    if qkv:
        attention.backward_keys(grad_out_BNHK, lse_BLN, delta_BLN, dqkv_BN3HK)
    return dqkv_BN3HK, gate_PBH.sum((0, 1)) if raw else gate_PBH
