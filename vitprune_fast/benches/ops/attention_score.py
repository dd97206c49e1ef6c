"""Attention forward and backward with scores of its heads against torch's, from tiny to base ViTs.

Both start from packed qkv and end with its packed gradient, as in the block of a ViT: that is what
torch's ``unbind`` costs in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from vitprune_fast import ops
from vitprune_fast.benches.place import Place
from vitprune_fast.benches.shapes import VIT_BASE, VIT_TINY

MODELS = {"ViT-Ti": VIT_TINY, "ViT-B": VIT_BASE}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def forms(qkv, grad, backend: ops.Backend):
    """Output, gradient of qkv and scores of the heads."""
    leaf = qkv.clone().requires_grad_()
    head = torch.zeros(qkv.shape[0], qkv.shape[3], device=qkv.device, requires_grad=True)

    def scored():
        out = ops.scored_attention(leaf, head, backend=backend)
        return out.detach(), *torch.autograd.grad(out, (leaf, head), grad)

    def sdpa():
        q, k, v = (x.transpose(1, 2) for x in leaf.unbind(2))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        (dqkv,) = torch.autograd.grad(out, leaf, grad)
        out = out.detach()
        return out, dqkv, (out.float() * grad.float()).sum((1, 3))

    return {"vitprune": scored, "SDPA, (o * do).sum": sdpa}


def run(race, place: Place, model: str, dtype: str) -> None:
    shape, batch = place.shape(MODELS[model]), place.samples
    sizes = (batch, shape.tokens, shape.heads, shape.head_dim)
    element = place.dtype(DTYPES[dtype])
    qkv = torch.randn(batch, shape.tokens, 3, *sizes[2:], device=place.device).to(element)
    grad = torch.randn(sizes, device=place.device).to(element)
    race(
        "attention_score",
        f"{model} heads {sizes}, {dtype}, forward and backward",
        forms(qkv, grad, place.backend),
        device=place.device,
        # q, k, v and out; then q, k, v, out, dout and their gradients
        bytes_moved=12 * grad.nbytes,
    )


def cases(place: Place) -> dict[str, Callable]:
    """By the names of the cases, what runs a race of each."""
    return {
        f"{model}-{dtype}": partial(run, place=place, model=model, dtype=dtype)
        for model in MODELS
        for dtype in DTYPES
    }
