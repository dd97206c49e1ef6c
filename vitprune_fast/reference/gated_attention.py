"""Oracle of ``ops.gated_attention``, differentiable by autograd.

B batch, N tokens, H heads, L live heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitprune_fast.wide import wide


def gated_attention(
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None,
    live: Sequence[int],
    mask_BN: Tensor | None,
    scale: float,
    compact: bool,
) -> Tensor:
    """``out = gate * softmax(scale * q k^T) v`` of the live heads; dead heads are never looked at.

    Keys where the mask is False count as zeros and weigh nothing; a sample without any key gives 0.
    In fp64 for fp64 inputs, else in fp32; the output is rounded to the input's dtype at the end.
    """
    batch, num_tokens, _, num_heads, head_dim = qkv_BN3HK.shape
    index_L = torch.tensor(live, dtype=torch.int64, device=qkv_BN3HK.device)
    qkv_BN3LK = wide(qkv_BN3HK.index_select(3, index_L))
    q_BLNK, k_BLNK, v_BLNK = (x.transpose(1, 2) for x in qkv_BN3LK.unbind(2))
    if mask_BN is None:
        mask_BN = torch.ones(batch, num_tokens, dtype=torch.bool, device=qkv_BN3HK.device)
    masked_keys = ~mask_BN[:, None, :, None]
    k_BLNK, v_BLNK = k_BLNK.masked_fill(masked_keys, 0), v_BLNK.masked_fill(masked_keys, 0)
    logits_BLNN = scale * q_BLNK @ k_BLNK.mT
    # a softmax without any key is no number, so there it takes them all, and its weights go after
    nothing_B111 = ~mask_BN.any(1)[:, None, None, None]
    logits_BLNN = logits_BLNN.masked_fill(masked_keys.mT & ~nothing_B111, -torch.inf)
    p_BLNN = logits_BLNN.softmax(3).masked_fill(masked_keys.mT, 0)
    out_BNLK = (p_BLNN @ v_BLNK).transpose(1, 2)
    if gate_H is not None:
        out_BNLK = out_BNLK * gate_H.to(qkv_BN3LK.dtype)[index_L, None]
    if not compact:
        zeros_BNHK = qkv_BN3LK.new_zeros(batch, num_tokens, num_heads, head_dim)
        out_BNLK = zeros_BNHK.index_copy(2, index_L, out_BNLK)
    return out_BNLK.to(qkv_BN3HK.dtype)
