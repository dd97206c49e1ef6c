"""Oracle of ``ops.taylor_score``."""

from __future__ import annotations

from torch import Tensor

from vitprune_fast.wide import wide


def taylor_score(
    activation_BNF: Tensor, gradient_BNF: Tensor, group_size: int = 1, per_token: bool = False
) -> Tensor:
    """``s[b, u]`` = sum over tokens and the unit's columns of activation x gradient.

    With ``per_token`` the magnitude of each token's share is summed. In fp64 for fp64 inputs, else
    in fp32.
    """
    product_BNF = wide(activation_BNF) * wide(gradient_BNF)
    if per_token:
        return product_BNF.unflatten(2, (-1, group_size)).sum(3).abs().sum(1)
    return product_BNF.sum(1).unflatten(1, (-1, group_size)).sum(2)
