"""The fast path, for modules of known classes: their forward is exchanged while scoring.

The exchanged forward computes the same function with scored ops: the activation's backward writes
the gradient and the neuron scores in one pass, attention's backward the packed gradient and the
scores of heads and dims, a norm's backward those of its channels. Activations are recomputed, not
saved, and gradients of q, k and v are written where the qkv projection wants them.

On a CPU that attention can pay without scores too, see :func:`quick_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import timm.layers
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from .. import _extension, ops
from ..errors import InvalidInput
from ..modules.norms import NORMS, epsilon, is_rms
from ..modules.swap import exchange_forward
from ..structure.paths import get
from .probes import Probes, as_tokens, tap_norm
from .sites import Site

_GELUS = (nn.GELU, timm.layers.GELU)
_OTHERS = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    timm.layers.GELUTanh: "gelu_tanh",
    timm.layers.QuickGELU: "quick_gelu",
}
# in which our attention pays on a CPU
_QUICK = (torch.bfloat16, torch.float16)


@contextmanager
def exchanged(model: nn.Module, sites: Sequence[Site], probes: Probes) -> Iterator[list[Site]]:
    """Exchange the forward of every known module that serves a site; back again on leaving.

    Yields:
        The sites that are left for hooks.
    """
    rest: list[Site] = []
    by_module: dict[str, list[Site]] = {}
    for site in sites:
        owner = _owner(model, site)
        if owner is None:
            rest.append(site)
        else:
            by_module.setdefault(owner, []).append(site)
    forwards = quick_attention(model)
    for path, served in by_module.items():
        module: Any = get(model, path)
        forward = _forward_of(module)
        forwards[module] = partial(forward, module, {s.kind: s for s in served}, probes)
    with standing_in(forwards):
        yield rest


def quick_attention(model: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """The attentions of timm in a model, and what may stand for their forward while it is trained.

    On a CPU in 16 bits it computes the same, up to rounding, by our op: torch's fused attention is
    slow at its backward there, and the plain form, which may be as fast or slower by what the
    processor can multiply, keeps all the weights of the tokens in memory. In fp32 torch's form is
    as fast (``bench/bench_attention_form.py``); there, and without gradients, it is the forward of
    the class. Attention whose parts somebody listens to is not among them.
    """
    if _extension.OBSTACLE is not None:
        return {}
    return {
        module: partial(_quick_attention, module)
        for module in model.modules()
        if type(module) is Attention
        and module.qkv is not None
        and runs_its_class(module)
        and _is_plain(module.attn_drop)
    }


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Exchange the forward of modules; back again on leaving."""
    with ExitStack() as restore:
        for module, forward in forwards.items():
            restore.callback(exchange_forward(module, forward))
        yield


def _owner(model: nn.Module, site: Site) -> str | None:
    """Path of the module whose exchanged forward measures the site; None where a hook must."""
    path = site.module if site.at_norm else site.module.rpartition(".")[0]
    owner: Any = get(model, path)
    # a module that runs something else than its class says is left alone
    if site.of_bias or not runs_its_class(owner):
        return None
    if site.at_norm:
        return path if type(owner) in NORMS.values() else None
    # as is one with a part that would no longer be called, and somebody listens to or altered
    if not all(_is_plain(getattr(owner, name, None)) for name in ("act", "norm", "attn_drop")):
        return None
    if type(owner) is Attention and site.kind in ("head", "v_dim", "qk_dim"):
        # behind a norm or a gate the units' activations are no longer what attention puts out
        plain = is_plain_attention(owner)
        return path if owner.qkv is not None and (plain or site.kind == "qk_dim") else None
    if site.kind == "neuron":
        return path if is_plain_mlp(owner) else None
    return None


def is_plain_mlp(owner: Any) -> bool:
    """Whether a module is an MLP that can be computed by its layers and one op between them."""
    return (
        type(owner) in (Mlp, GluMlp, SwiGLU)
        and runs_its_class(owner)
        and all(_is_plain(getattr(owner, name)) for name in ("act", "norm"))
        and isinstance(owner.norm, nn.Identity)
        and isinstance(owner.fc2, nn.Linear)
        and activation_of(owner.act) is not None
    )


def is_plain_attention(owner: Any) -> bool:
    """Whether a module is an attention of timm whose heads' outputs go straight to ``proj``."""
    return (
        type(owner) is Attention
        and runs_its_class(owner)
        and owner.qkv is not None
        # timm's attention got gates after 1.0.23
        and getattr(owner, "gate", None) is None
        and isinstance(owner.norm, nn.Identity)
        and _is_plain(owner.norm)
        and _is_plain(owner.attn_drop)
    )


def has_mask(mask: Mapping[str, Any]) -> bool:
    """Whether one of the arguments that timm's version of attention takes beside x masks tokens.

    They are ``attn_mask``, and ``is_causal`` in versions after 1.0.23.
    """
    return any(value is not None and value is not False for value in mask.values())


def packed_qkv(attn: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of timm's Attention, ``(B, N, 3, H, K)``, after its norms."""
    qkv_BN3HK = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim))
    if not isinstance(attn.q_norm, nn.Identity) or not isinstance(attn.k_norm, nn.Identity):
        q, k, v = qkv_BN3HK.unbind(2)
        qkv_BN3HK = torch.stack((attn.q_norm(q), attn.k_norm(k), v), 2)
    return qkv_BN3HK


def runs_its_class(module: Any) -> bool:
    """Whether a module's forward is that of its class, or the one that stands for it here."""
    forward = vars(module).get("forward")
    ours = (_attention, _quick_attention, _mlp, _norm)
    return forward is None or getattr(forward, "func", None) in ours


def _is_plain(module: Any) -> bool:
    """Whether a module may be passed over: no hooks, and no forward of its own."""
    if not isinstance(module, nn.Module):
        return True
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return runs_its_class(module) and not any((*hooks, module._backward_pre_hooks))


def activation_of(module: Any) -> str | None:
    """Name of the activation as the scored ops know it, or None."""
    if type(module) in _GELUS:
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    return _OTHERS.get(type(module))


def _forward_of(module: nn.Module) -> Callable[..., Tensor]:
    if isinstance(module, Attention):
        return _attention
    return _mlp if isinstance(module, (Mlp, GluMlp, SwiGLU)) else _norm


def _attention(
    attn: Any,
    sites: dict[str, Site],
    probes: Probes,
    x: Tensor,
    **mask: Any,
) -> Tensor:
    """timm's Attention; B batch, N tokens, H heads, K head dim."""
    if has_mask(mask):
        raise InvalidInput(
            "score: attention must be without a mask, got one; score with path='taps'"
        )
    heads, width = attn.num_heads, attn.head_dim
    sizes = {"head": (heads,), "v_dim": (heads, width), "qk_dim": (heads, width)}
    inside = {kind: probes.leaf(site.key, x, *sizes[kind]) for kind, site in sites.items()}
    by_kind = (inside.get("head"), inside.get("qk_dim"), inside.get("v_dim"))
    return _attend(attn, x, *by_kind, per_token=probes.per_token)


def _quick_attention(attn: Any, x: Tensor, **mask: Any) -> Tensor:
    """timm's Attention; by our op where that pays."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    pays = x.is_cpu and torch.is_grad_enabled() and dtype in _QUICK
    if not pays or has_mask(mask) or (attn.training and attn.attn_drop.p > 0):
        return type(attn).forward(attn, x, **mask)
    return _attend(attn, x)


def _attend(attn: Any, x: Tensor, *probes: Tensor | None, per_token: bool = False) -> Tensor:
    """timm's Attention without a mask, by our op."""
    gated = getattr(attn, "gate", None)
    gate = gated(x).sigmoid() if gated is not None else None
    out = ops.scored_attention(
        packed_qkv(attn, x),
        *probes,
        # timm's fused path takes the scale from the width, the other one from the attribute
        scale=None if attn.fused_attn else attn.scale,
        per_token=per_token,
    )
    out = attn.norm(out.flatten(2))
    if gate is not None:
        out = out * gate
    return attn.proj_drop(attn.proj(out))


def _mlp(mlp: Any, sites: dict[str, Site], probes: Probes, x: Tensor) -> Tensor:
    """timm's Mlp, GluMlp and SwiGLU without an inner norm."""
    site = sites["neuron"]
    probe = probes.leaf(site.key, x, site.size)
    how: Any = {"activation": activation_of(mlp.act), "per_token": probes.per_token}
    if isinstance(mlp, SwiGLU):
        h = ops.scored_glu(mlp.fc1_g(x), mlp.fc1_x(x), probe, **how)
    elif isinstance(mlp, GluMlp):
        h = ops.scored_glu_packed(mlp.fc1(x), probe, gate_last=mlp.gate_last, **how)
    else:
        h = ops.scored_activation(mlp.fc1(x), probe, **how)
    return mlp.drop2(mlp.fc2(mlp.drop1(h)))


def _norm(norm: Any, sites: dict[str, Site], probes: Probes, x: Tensor) -> Tensor:
    """LayerNorm and RMSNorm of torch and timm."""
    (site,) = sites.values()
    probe, output = probes.leaf(site.key, x, site.size), site.place.at == "norm"
    if norm.weight is not None and norm.weight.dtype != x.dtype:
        # autocast, or a norm that was left in fp32: the norm itself knows which dtype comes out
        y = type(norm).forward(norm, x)
        eps = epsilon(norm, y.dtype)
        return tap_norm(y, probe, x, norm, rms=is_rms(norm), eps=eps, output=output)
    y = ops.scored_norm(
        as_tokens(x),
        probe,
        norm.weight,
        getattr(norm, "bias", None),
        epsilon(norm, x.dtype),
        rms=is_rms(norm),
        output=output,
    )
    return y.reshape(x.shape)
