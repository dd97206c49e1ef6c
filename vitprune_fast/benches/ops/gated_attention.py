"""Attention with learned gates, forward and backward, where some heads are dead, against torch's.

From packed qkv to packed dqkv and the gradient of the gates. Dead heads have the gate 0 in torch's
forms, which compute them all the same; ours gives the live heads alone. Live heads come first, so
that the live part of a result is a view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vitprune_fast import ops
from vitprune_fast.benches.place import Place
from vitprune_fast.benches.shapes import VIT_BASE, VIT_BASE_384

MODELS = {"ViT-B": VIT_BASE, "ViT-B/384": VIT_BASE_384}
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa_times_gate(qkv, gate, attend=scaled_dot_product_attention):
    """What one writes without us."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return (attend(q, k, v).transpose(1, 2) * gate[:, None]).to(qkv.dtype)


def kernels_of_torch() -> dict[str, Callable]:
    """Each of torch's fused kernels by its name."""

    def with_kernel(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        return lambda qkv, gate: sdpa_times_gate(qkv, gate, attend)

    return {f"SDPA {name} x gate": with_kernel(backend) for name, backend in PEERS.items()}


@functools.cache
def compiled() -> dict[str, Callable]:
    """What torch's compiler makes of it, and of FlexAttention: compiled once for all cases."""
    from torch.nn.attention.flex_attention import flex_attention

    return {
        "compiled SDPA x gate": torch.compile(sdpa_times_gate, dynamic=False),
        "compiled FlexAttention x gate": torch.compile(
            lambda qkv, gate: sdpa_times_gate(qkv, gate, flex_attention), dynamic=False
        ),
    }


def forms(qkv, gate, grad, live: int, place: Place) -> dict[str, Callable]:
    """Output of the live heads, gradient of qkv, and that of the live gates."""
    leaves = qkv.requires_grad_(), gate.requires_grad_()
    heads = range(live)
    # needs Triton
    tiles: Any = None
    if place.backend == "triton":
        from vitprune_fast.kernels import _attention_tiles as tiles

    def call(form):
        out = form(*leaves)
        given = grad[:, :, : out.shape[2]]
        dqkv, dgate = torch.autograd.grad(out, leaves, given)
        return out.detach()[:, :, :live], dqkv, dgate[:live]

    def ours(qkv, gate):
        return ops.gated_attention(qkv, gate, live_heads=heads, compact=True, backend=place.backend)

    def with_tiles(launch: str, name: str) -> Callable:
        def tuned():
            with tiles.forced(**{launch: name}):
                return call(ours)

        return tuned

    peers = {"SDPA x gate": sdpa_times_gate, **(kernels_of_torch() if qkv.is_cuda else {})}
    if place.compiled:
        peers = compiled()
    found: dict[str, Callable] = {"vitprune": lambda: call(ours)}
    if place.backend == "triton" and not place.compiled:
        found |= {
            f"vitprune, {name} tiles of {launch}": with_tiles(launch, name)
            for launch, names in tiles.CANDIDATES.items()
            for name in names
        }
    for name, form in peers.items():
        try:
            call(form)
        except RuntimeError as error:
            # a kernel that this GPU or these sizes do not have
            print(f"{name} cannot run here: {str(error).splitlines()[0]}")
        else:
            found[name] = lambda form=form: call(form)
    return found


def run(race, place: Place, model: str, batch: int, dead: float, dtype: torch.dtype) -> None:
    """One race with a share of the heads dead."""
    shape, batch, dtype = place.shape(MODELS[model]), place.batch(batch), place.dtype(dtype)
    sizes = (batch, shape.tokens, shape.heads, shape.head_dim)
    live = round(shape.heads * (1 - dead))
    qkv = torch.randn(batch, shape.tokens, 3, *sizes[2:], device=place.device, dtype=dtype)
    grad = torch.randn(sizes, device=place.device, dtype=dtype)
    gate = torch.linspace(0.5, 1.5, shape.heads, device=place.device)
    gate[live:] = 0
    race(
        "gated_attention",
        f"{model} heads {sizes}, {live} live, {str(dtype).removeprefix('torch.')}, "
        "forward and backward",
        forms(qkv, gate, grad, live, place),
        device=place.device,
        # of live heads: q, k, v and out; then q, k, v, out, dout and their gradients
        bytes_moved=12 * grad.nbytes * live // shape.heads,
    )


def cases(place: Place) -> dict[str, Callable]:
    """By the names of the cases, what runs a race of each."""
    sizes, dtype = (("ViT-B", 2),), torch.float32
    if place.is_for_a_gpu:
        sizes, dtype = (("ViT-B", 256), ("ViT-B/384", 64)), torch.bfloat16
    return {
        f"{model}-{batch}-{dead}": partial(
            run, place=place, model=model, batch=batch, dead=dead, dtype=dtype
        )
        for model, batch in sizes
        for dead in (0.0, 0.25, 0.5, 0.75)
    }
