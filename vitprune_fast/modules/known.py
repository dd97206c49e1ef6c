"""Modules of timm whose forward is known, so that an op can compute what lies inside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import timm.layers
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

_GELUS = (nn.GELU, timm.layers.GELU)
_OTHERS = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    timm.layers.GELUTanh: "gelu_tanh",
    timm.layers.QuickGELU: "quick_gelu",
}
# functions that compute, as far as a caller can see, what the class of a module does
_EQUIVALENT: set[Callable] = set()


def equivalent(forward: Callable) -> Callable:
    """Mark a function whose partials stand in for the forward of a class and compute the same."""
    _EQUIVALENT.add(forward)
    return forward


def runs_its_class(module: Any) -> bool:
    """Whether a module's forward is that of its class, or an `equivalent` one in its place."""
    forward = vars(module).get("forward")
    return forward is None or getattr(forward, "func", None) in _EQUIVALENT


def is_plain(module: Any) -> bool:
    """Whether a module may be passed over: no hooks, and no forward of its own."""
    if not isinstance(module, nn.Module):
        return True
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return runs_its_class(module) and not any((*hooks, module._backward_pre_hooks))


def activation_of(module: Any) -> str | None:
    """Name of the activation as the ops know it, or None."""
    if type(module) in _GELUS:
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    return _OTHERS.get(type(module))


def is_plain_mlp(module: Any) -> bool:
    """Whether a module is an MLP that can be computed by its layers and one op between them."""
    return (
        type(module) in (Mlp, GluMlp, SwiGLU)
        and runs_its_class(module)
        and all(is_plain(getattr(module, name)) for name in ("act", "norm"))
        and isinstance(module.norm, nn.Identity)
        and isinstance(module.fc2, nn.Linear)
        and activation_of(module.act) is not None
    )


def run_mlp(mlp: Any, x: Tensor, units: Callable[..., Tensor]) -> Tensor:
    """The forward of a plain MLP, with an op in place of what lies between its layers.

    Args:
        mlp: one that `is_plain_mlp` knows.
        x: ``(..., C)``.
        units: gets what the first layer puts out; of a SwiGLU with ``value_BNF=``, and with
            ``packed=`` where both are side by side, see ``ops.gated_unit``.
    """
    if isinstance(mlp, SwiGLU):
        h = units(mlp.fc1_g(x), value_BNF=mlp.fc1_x(x))
    elif isinstance(mlp, GluMlp):
        h = units(mlp.fc1(x), packed="x_last" if mlp.gate_last else "x_first")
    else:
        h = units(mlp.fc1(x))
    return mlp.drop2(mlp.fc2(mlp.drop1(h)))


def is_attention(module: Any) -> bool:
    """Whether a module is an attention of timm with packed queries, keys and values."""
    return type(module) is Attention and module.qkv is not None and runs_its_class(module)


def is_plain_attention(module: Any) -> bool:
    """Whether it is one whose heads' outputs go straight to ``proj``."""
    return (
        is_attention(module)
        # timm's attention got gates after 1.0.23
        and getattr(module, "gate", None) is None
        and isinstance(module.norm, nn.Identity)
        and is_plain(module.norm)
        and is_plain(module.attn_drop)
    )


def has_mask(mask: Mapping[str, Any]) -> bool:
    """Whether one of the arguments that timm's version of attention takes besides x masks tokens.

    They are ``attn_mask``, and ``is_causal`` in versions after 1.0.23.
    """
    return any(value is not None and value is not False for value in mask.values())


def masks_or_drops(attn: Any, mask: Mapping[str, Any]) -> bool:
    """Whether tokens are masked or attention weights dropped, neither of which our ops do."""
    return has_mask(mask) or (attn.training and attn.attn_drop.p > 0)


def run_attention(attn: Any, x: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """The forward of an attention without a mask and without dropout of its weights.

    Args:
        attn: one that `is_attention` knows.
        x: ``(B, N, C)``.
        attend: gets queries, keys and values ``(B, N, 3, H, K)`` after their norms and ``scale=``
            (None is ``K ** -0.5``), and gives ``(B, N, H, K)``.
    """
    qkv_BN3HK = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim))
    if not isinstance(attn.q_norm, nn.Identity) or not isinstance(attn.k_norm, nn.Identity):
        q, k, v = qkv_BN3HK.unbind(2)
        qkv_BN3HK = torch.stack((attn.q_norm(q), attn.k_norm(k), v), 2)
    gated = getattr(attn, "gate", None)
    gate = gated(x).sigmoid() if gated is not None else None
    # timm's fused path takes the scale from the width, the other one from the attribute
    out = attend(qkv_BN3HK, scale=None if attn.fused_attn else attn.scale)
    out = attn.norm(out.flatten(2))
    if gate is not None:
        out = out * gate
    return attn.proj_drop(attn.proj(out))
