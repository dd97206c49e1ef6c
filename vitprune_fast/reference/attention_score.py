"""Oracle of ``ops.attention``, ``ops.attention_score`` and ``ops.scored_attention``.

B batch, N tokens, H heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast.wide import wide


def _heads_first(qkv_BN3HK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_BNHK, k_BNHK, v_BNHK = wide(qkv_BN3HK).unbind(2)
    return q_BNHK.transpose(1, 2), k_BNHK.transpose(1, 2), v_BNHK.transpose(1, 2)


def attention(qkv_BN3HK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``out = softmax(scale * q k^T) v`` and the natural logarithm of each row's normaliser.

    In fp64 for fp64 inputs, else in fp32; the output is rounded to the input's dtype at the end.
    """
    q_BHNK, k_BHNK, v_BHNK = _heads_first(qkv_BN3HK)
    logits_BHNN = scale * q_BHNK @ k_BHNK.transpose(2, 3)
    lse_BHN = logits_BHNN.logsumexp(3)
    out_BHNK = (logits_BHNN - lse_BHN[..., None]).exp() @ v_BHNK
    return out_BHNK.transpose(1, 2).to(qkv_BN3HK.dtype).contiguous(), lse_BHN


def attention_score(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    out_BNHK: Tensor,
    lse_BHN: Tensor,
    scale: float,
    per_token: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of packed qkv, and the scores of heads, q/k dims and v dims.

    With ``P = exp(S - lse)`` and ``delta_n = sum_k out * dout`` the gradient of the logits is
    ``dS = P * (dP - delta)`` (Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2).
    """
    q_BHNK, k_BHNK, v_BHNK = _heads_first(qkv_BN3HK)
    dout_BHNK = wide(grad_out_BNHK).transpose(1, 2)
    product_BHNK = wide(out_BNHK).transpose(1, 2) * dout_BHNK
    delta_BHN = product_BHNK.sum(3)
    p_BHNN = (scale * q_BHNK @ k_BHNK.transpose(2, 3) - lse_BHN[..., None]).exp()
    dp_BHNN = dout_BHNK @ v_BHNK.transpose(2, 3)
    ds_BHNN = p_BHNN * (dp_BHNN - delta_BHN[..., None]) * scale
    dq_BHNK = ds_BHNN @ k_BHNK
    dk_BHNK = ds_BHNN.transpose(2, 3) @ q_BHNK
    dv_BHNK = p_BHNN.transpose(2, 3) @ dout_BHNK
    dqkv_BN3HK = torch.stack([x.transpose(1, 2) for x in (dq_BHNK, dk_BHNK, dv_BHNK)], 2)

    def over_tokens(terms: Tensor) -> Tensor:
        return (terms.abs() if per_token else terms).sum(2)

    return (
        dqkv_BN3HK.to(qkv_BN3HK.dtype),
        over_tokens(delta_BHN),
        over_tokens(q_BHNK * dq_BHNK),
        over_tokens(product_BHNK),
    )
