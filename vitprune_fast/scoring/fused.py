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

import torch
from torch import Tensor, nn

from .. import _extension, ops
from ..errors import InvalidInput
from ..modules.known import (
    activation_of,
    equivalent,
    has_mask,
    is_attention,
    is_plain,
    is_plain_attention,
    is_plain_mlp,
    masks_or_drops,
    run_attention,
    run_mlp,
    runs_its_class,
)
from ..modules.norms import NORMS, epsilon, is_rms
from ..modules.swap import exchange_forward
from ..structure.paths import get
from .probes import Probes, as_tokens, tap_norm
from .sites import Site

# in which our attention pays on a CPU
_QUICK = (torch.bfloat16, torch.float16)


@contextmanager
def exchanged(model: nn.Module, sites: Sequence[Site], probes: Probes) -> Iterator[list[Site]]:
    """Exchange the forward of every known module that serves a site; back again on leaving.

    Yields:
        The sites that are left for hooks.
    """
    rest: list[Site] = []
    served: dict[tuple[nn.Module, Callable[..., Tensor]], dict[str, Site]] = {}
    for site in sites:
        owner = _owner(model, site)
        if owner is None:
            rest.append(site)
        else:
            served.setdefault(owner, {})[site.kind] = site
    forwards = quick_attention(model)
    for (module, forward), by_kind in served.items():
        forwards[module] = partial(forward, module, by_kind, probes)
    with standing_in(forwards):
        yield rest


def quick_attention(model: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """The attentions of timm in a model, each with an equivalent forward for its training.

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
        if is_attention(module) and is_plain(module.attn_drop)
    }


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Exchange the forward of modules; back again on leaving."""
    with ExitStack() as restore:
        for module, forward in forwards.items():
            restore.callback(exchange_forward(module, forward))
        yield


def _owner(model: nn.Module, site: Site) -> tuple[nn.Module, Callable[..., Tensor]] | None:
    """The module to exchange the forward of, and which one measures; None where a hook must."""
    owner: Any = get(model, site.module if site.at_norm else site.module.rpartition(".")[0])
    # a module that runs something else than its class says is left alone
    if site.of_bias or not runs_its_class(owner):
        return None
    if site.at_norm:
        return (owner, _norm) if type(owner) in NORMS.values() else None
    # as is one with a part that would no longer be called, and somebody listens to or altered
    if not all(is_plain(getattr(owner, name, None)) for name in ("act", "norm", "attn_drop")):
        return None
    if site.kind in ("head", "v_dim", "qk_dim"):
        # behind a norm or a gate the units' activations are no longer what attention puts out
        known = is_attention if site.kind == "qk_dim" else is_plain_attention
        return (owner, _attention) if known(owner) else None
    return (owner, _mlp) if site.kind == "neuron" and is_plain_mlp(owner) else None


@equivalent
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
    attend = partial(_attend, probes=by_kind, per_token=probes.per_token)
    return run_attention(attn, x, attend)


@equivalent
def _quick_attention(attn: Any, x: Tensor, **mask: Any) -> Tensor:
    """timm's Attention; by our op where that pays."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    pays = x.is_cpu and torch.is_grad_enabled() and dtype in _QUICK
    if not pays or masks_or_drops(attn, mask):
        return type(attn).forward(attn, x, **mask)
    return run_attention(attn, x, _attend)


def _attend(
    qkv_BN3HK: Tensor,
    scale: float | None,
    probes: Sequence[Tensor | None] = (),
    per_token: bool = False,
) -> Tensor:
    return ops.scored_attention(qkv_BN3HK, *probes, scale=scale, per_token=per_token)


@equivalent
def _mlp(mlp: Any, sites: dict[str, Site], probes: Probes, x: Tensor) -> Tensor:
    """timm's Mlp, GluMlp and SwiGLU without an inner norm."""
    site = sites["neuron"]
    probe = probes.leaf(site.key, x, site.size)
    name = activation_of(mlp.act)
    assert name is not None
    units = partial(ops.gated_unit, probe_BF=probe, activation=name, per_token=probes.per_token)
    return run_mlp(mlp, x, units)


@equivalent
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
