"""taylor_score against plain torch: one layer of a ViT-B, neurons and heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from vitprune_fast import ops
from vitprune_fast.benches.place import Place
from vitprune_fast.benches.shapes import VIT_BASE

UNITS = ("neurons", "heads")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def forms(activation, gradient, group_size: int, place: Place) -> dict:
    """Ours, and what one would write without us, accumulating in fp32 as ours does."""

    def product_then_sum():
        product = activation.float() * gradient.float()
        return product.sum(1).unflatten(1, (-1, group_size)).sum(2)

    def einsum():
        a, g = (x.float().unflatten(2, (-1, group_size)) for x in (activation, gradient))
        return torch.einsum("bnuk,bnuk->bu", a, g)

    def ours():
        return ops.taylor_score(activation, gradient, group_size, backend=place.backend)

    if place.compiled:
        return {"vitprune": ours, "torch.compile": torch.compile(product_then_sum)}
    return {"vitprune": ours, "(a * g).sum": product_then_sum, "einsum": einsum}


def run(race, place: Place, units: str, dtype: str) -> None:
    """One race of a layer's neurons or heads."""
    sizes, element = place.shape(VIT_BASE), place.dtype(DTYPES[dtype])
    columns, group = (sizes.hidden, 1) if units == "neurons" else (sizes.width, sizes.head_dim)
    shape = (place.samples, sizes.tokens, columns)
    activation, gradient = (torch.randn(shape, device=place.device).to(element) for _ in range(2))
    race(
        "taylor_score",
        f"ViT-B {units} {shape}, {dtype}",
        forms(activation, gradient, group, place),
        device=place.device,
        bytes_moved=2 * activation.nbytes,
    )


def cases(place: Place) -> dict[str, Callable]:
    """By the names of the cases, what runs a race of each."""
    return {
        f"{units}-{dtype}": partial(run, place=place, units=units, dtype=dtype)
        for units in UNITS
        for dtype in DTYPES
    }
