"""Attention with a gate per head over live heads: launches of the kernels of ``attention``.

B batch, N tokens, H heads, L live heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).
"""

from __future__ import annotations

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
    dqkv_BN3HK, gate_PBH, *_ = attention.backward(
        grad_out_BNHK, out_BNHK, lse_BLN, qkv=qkv, head=raw, raw=raw
    )
    return dqkv_BN3HK, gate_PBH.sum((0, 1)) if raw else gate_PBH
