"""norm_score against torch's own backward followed by the score: one norm of a ViT-B."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vitprune_fast import ops
from vitprune_fast.benches.place import Place
from vitprune_fast.benches.shapes import VIT_BASE
from vitprune_fast.reference.norm_score import norm_score as plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-6


def torch_then_score(x: Tensor, grad_y: Tensor, weight: Tensor, bias: Tensor):
    """torch's fused backward for the gradient, then the score from what the forward has saved."""
    size = weight.shape
    y, mean, scale = torch.native_layer_norm(x, size, weight, bias, EPS)

    def backward() -> tuple[Tensor, Tensor]:
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad_y, x, size, mean, scale, weight, bias, [True, False, False]
        )[0]
        x_hat = (x.float() - mean) * scale
        gradient = grad_y.float() * weight.float()
        c1, c2 = (gradient * x_hat).mean(2, keepdim=True), gradient.mean(2, keepdim=True)
        share = 1 - EPS * scale.float().square()
        parts = y.float() * grad_y.float() - x_hat * c2 - (x_hat.square() - share) * c1 / 2
        return grad_x, parts.sum(1)

    return backward


def forms(shape: tuple[int, int, int], dtype: torch.dtype, place: Place) -> dict:
    """Ours, and what one would write without us, accumulating in fp32 as ours does."""
    x, grad_y = (torch.randn(shape, device=place.device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[2], device=place.device).to(dtype) for _ in range(2))
    tensors = (x, grad_y, weight, bias)
    found = {"vitprune": lambda: ops.norm_score(*tensors, EPS, backend=place.backend)}
    if place.compiled:
        compiled = torch.compile(plain)
        return {**found, "torch.compile": lambda: compiled(*tensors, EPS)}
    return {
        **found,
        "torch's backward, then the score": torch_then_score(*tensors),
        "plain torch": lambda: plain(*tensors, EPS),
    }


def run(race, place: Place, dtype: str) -> None:
    """One race of a LayerNorm."""
    sizes, element = place.shape(VIT_BASE), place.dtype(DTYPES[dtype])
    shape = (place.samples, sizes.tokens, sizes.width)
    race(
        "norm_score",
        f"ViT-B LayerNorm {shape}, {dtype}",
        forms(shape, element, place),
        device=place.device,
        bytes_moved=3 * element.itemsize * shape[0] * shape[1] * shape[2],
    )


def cases(place: Place) -> dict[str, Callable]:
    """By the names of the cases, what runs a race of each."""
    return {dtype: partial(run, place=place, dtype=dtype) for dtype in DTYPES}
