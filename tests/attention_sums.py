"""What rounding may do to attention and its gradient; B batch, N tokens, H heads, K head dim."""

from __future__ import annotations

from typing import NamedTuple

import torch
from error_budget import Rounded
from torch import Tensor


class AttentionSums(NamedTuple):
    """Output, normaliser and gradient; and what the scores of heads, q/k dims and v dims add."""

    out: Rounded  # (B, N, H, K)
    lse: Rounded  # (B, H, N)
    dqkv: Rounded  # (B, N, 3, H, K)
    head: Rounded  # (B, H, N)
    qk_dim: Rounded  # (B, H, N, K)
    v_dim: Rounded  # (B, H, N, K)


def attention_sums(
    qkv_BN3HK: Tensor,
    dout_BNHK: Tensor,
    scale: float,
    mask_BN: Tensor | None = None,
    gate_H: Tensor | float = 1.0,
    out_BNHK: Tensor | None = None,
) -> AttentionSums:
    """The formulas of ``reference.attention`` and ``attention_score``; scores before their sum.

    The gate multiplies the output; ``head`` is the product of the output before it and ``dout``.
    What a matrix product or the backward reads is stored in the dtype of the input; an output that
    the backward is given is exact.
    """
    dtype = qkv_BN3HK.dtype
    q, k, v = (Rounded.of(x.transpose(1, 2), dtype) for x in qkv_BN3HK.unbind(2))
    dout = Rounded.of(dout_BNHK.transpose(1, 2), dtype)
    logits = q @ k.mT * scale
    if mask_BN is not None:
        masked = ~mask_BN[:, None, None]
        # a sample without any key keeps them all, and their weights go after
        logits = logits.masked_fill(masked & mask_BN.any(1)[:, None, None, None], -torch.inf)
    lse = logits.logsumexp()
    p = (logits - lse).exp().stored(dtype)
    if mask_BN is not None:
        p = p.masked_fill(masked, 0)
    out = (p @ v).stored(dtype)
    if out_BNHK is not None:
        out = Rounded.of(out_BNHK.transpose(1, 2), dtype)
    head = (out * dout).sum(-1)
    gates = torch.as_tensor(gate_H, dtype=torch.float64).reshape(-1, 1, 1)
    dout = dout * gates
    delta = (out * dout).sum(-1).unsqueeze(-1)
    ds = (p * (dout @ v.mT - delta) * scale).stored(dtype)
    gradients = ds @ k, ds.mT @ q, p.mT @ dout
    dq = gradients[0]
    return AttentionSums(
        (out * gates).transpose(1, 2),
        lse.squeeze(-1),
        Rounded.stack([x.transpose(1, 2) for x in gradients], 2),
        head,
        q * dq,
        out * dout,
    )
