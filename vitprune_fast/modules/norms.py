"""What is the same for every norm: its kind, its epsilon, and itself over a part of its input."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from ..errors import InvalidInput

NORMS = {
    "torch.LayerNorm": nn.LayerNorm,
    "LayerNorm": timm.layers.LayerNorm,
    "RmsNorm": timm.layers.RmsNorm,
}


def is_rms(norm: nn.Module) -> bool:
    """Whether a norm divides by the root mean square alone, without taking the mean off."""
    return not isinstance(norm, nn.LayerNorm)


def epsilon(norm: Any, dtype: torch.dtype) -> float:
    """What a norm adds under its root."""
    return torch.finfo(dtype).eps if norm.eps is None else norm.eps


def norm_over_kept(norm: Any, kept: Tensor, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm of ``x`` with statistics over the entries that are kept.

    Args:
        norm: the module, for its kind, eps, weight and bias.
        kept: boolean, broadcast against ``x``; its last dimension is the one normalised over.
        x: the input.

    Returns:
        Of the broadcast shape and the dtype of ``x``, zero where not kept. Lost entries are
        selected away, not multiplied by zero, so that NaN in them has no effect; statistics are in
        fp32 at least.
    """
    kept, values = kept.to(x.device), x.to(torch.promote_types(x.dtype, torch.float32))
    zero = values.new_zeros(())
    values = torch.where(kept, values, zero)
    count = kept.sum(-1, keepdim=True).clamp(min=1)
    if not is_rms(norm):
        values = torch.where(kept, values - values.sum(-1, keepdim=True) / count, zero)
    mean_square = values.square().sum(-1, keepdim=True) / count
    values = values * torch.rsqrt(mean_square + epsilon(norm, x.dtype))
    if norm.weight is not None:
        values = values * norm.weight
    bias = getattr(norm, "bias", None)
    values = values if bias is None else values + bias
    return torch.where(kept, values, zero).to(x.dtype)


def kept_by(op: str, path: str, norm: nn.Module) -> Tensor | None:
    """The entries a norm takes its statistics over while it runs `norm_over_kept`; None for all.

    Raises:
        InvalidInput: it runs a forward of somebody else's, which statistics over a part would
            stop.
    """
    forward = vars(norm).get("forward")
    if forward is None:
        return None
    if getattr(forward, "func", None) is norm_over_kept:
        return forward.args[1]
    raise InvalidInput(
        f"{op}: {path} must run the forward of its class where channels are left out of it, got "
        "one of its own; put it back first"
    )
