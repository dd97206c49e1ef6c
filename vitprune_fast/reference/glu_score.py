"""Oracle of ``ops.glu_score``."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast.reference.activation_score import value_and_slope


def glu_score(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    grad_BNF: Tensor,
    activation: str = "silu",
    *,
    per_token: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``h = act(gate) * value`` and ``score[b, f] = sum_n h * grad``.

    With ``per_token`` the magnitude of each token's share is summed. Computed in fp64 for fp64
    inputs, else in fp32; the gradients then get the dtype of ``gate``.
    """
    dtype = torch.float64 if gate_BNF.dtype == torch.float64 else torch.float32
    value, grad = value_BNF.to(dtype), grad_BNF.to(dtype)
    act, slope = value_and_slope(gate_BNF.to(dtype), activation)
    share = act * value * grad
    score_BF = (share.abs() if per_token else share).sum(1)
    return (grad * value * slope).to(gate_BNF.dtype), (grad * act).to(gate_BNF.dtype), score_BF
