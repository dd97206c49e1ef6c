"""gated_unit against torch's own ops: the MLP of a ViT-B, plain and as a packed SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from vitprune_fast.benches.place import Place
from vitprune_fast.benches.shapes import VIT_BASE, VIT_BASE_SWIGLU
from vitprune_fast.ops import gated_unit, gated_unit_score
from vitprune_fast.reference.gated_unit import gated_unit_backward, halves

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
gelu_backward = torch.ops.aten.gelu_backward


class Layer:
    """Inputs of one layer, and the name of its case."""

    def __init__(self, place: Place, dtype: torch.dtype, glu: bool) -> None:
        sizes, dtype = place.shape(VIT_BASE_SWIGLU if glu else VIT_BASE), place.dtype(dtype)
        shape = (place.samples, sizes.tokens, sizes.hidden)
        self.place, self.glu = place, glu
        self.x = torch.randn(*shape[:2], (1 + glu) * shape[2], device=place.device).to(dtype)
        self.grad = torch.randn(shape, device=place.device).to(dtype)
        self.gate = torch.rand(sizes.hidden, device=place.device)
        self.name = f"{'SwiGLU' if glu else 'ViT-B gelu'} {shape}{', packed' * glu}, "
        self.name += str(dtype).removeprefix("torch.")
        self.options: dict[str, Any] = {"backend": place.backend}
        self.options |= {"activation": "silu", "packed": "x_first"} if glu else {}

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return halves(x, "x_first") if self.glu else (x, None)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.parts(x)
        return F.gelu(gate) if value is None else F.silu(gate) * value


def score(race, layer: Layer) -> None:
    """A race for the gradient and the score, and without a value one for the gradient alone."""
    x, grad, place = layer.x, layer.grad, layer.place
    # what the forward, or a hook, has kept
    gate, value = layer.parts(x)
    h, act = layer.hidden(x), F.silu(gate)

    def ours():
        found = gated_unit_score(x, grad, **layer.options)
        return found.x, found.score

    def torch_then_score():
        if value is None:
            gradient = gelu_backward(grad, x)
        else:
            grad_gate = torch.ops.aten.silu_backward(grad * value, gate)
            gradient = torch.cat([grad_gate, grad * act], 2)
        return gradient, (h * grad).sum(1, dtype=torch.float32)

    def plain():
        name = "gelu" if value is None else "silu"
        grad_x, grad_value, score = gated_unit_backward(gate, value, None, grad, name)
        return grad_x if grad_value is None else torch.cat([grad_x, grad_value], 2), score

    what = "torch's backward" if layer.glu else "gelu_backward"
    peers = {f"{what}, then (h * grad).sum": torch_then_score, "plain torch": plain}
    if place.compiled:
        peers = {"torch.compile": torch.compile(plain)}
    moved = 2 * x.nbytes + grad.nbytes
    case = f"{layer.name}, score"
    race("gated_unit", case, {"vitprune": ours, **peers}, device=place.device, bytes_moved=moved)
    if not (place.compiled or layer.glu):
        alone = {
            "vitprune, score included": lambda: ours()[0],
            "gelu_backward alone": lambda: gelu_backward(grad, x),
        }
        case = f"{layer.name}, the gradient"
        race("gated_unit", case, alone, device=place.device, bytes_moved=moved)


def gated(race, layer: Layer) -> None:
    """A race of forward and backward, with the gradient of the gates."""
    place, leaves = layer.place, (layer.x.requires_grad_(), layer.gate.requires_grad_())

    def plain(x, gate):
        return layer.hidden(x) * gate.to(x.dtype)

    def there_and_back(form):
        out = form(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, layer.grad)

    def ours(x, gate):
        return gated_unit(x, gate, **layer.options)

    name, peer = (
        ("torch.compile", torch.compile(plain)) if place.compiled else ("plain torch", plain)
    )
    forms = {"vitprune": lambda: there_and_back(ours), name: lambda: there_and_back(peer)}
    moved = 3 * layer.x.nbytes + 2 * layer.grad.nbytes
    case = f"{layer.name}, gated, forward and backward"
    race("gated_unit", case, forms, device=place.device, bytes_moved=moved)


def cases(place: Place) -> dict[str, Callable]:
    """By the names of the cases, what runs a race of each."""

    def case(run: Callable, dtype: str, glu: bool) -> Callable:
        return lambda race: run(race, Layer(place, DTYPES[dtype], glu))

    return {
        f"{dtype}-{run.__name__}-{'glu' if glu else 'plain'}": case(run, dtype, glu)
        for dtype in DTYPES
        for run in (score, gated)
        for glu in (False, True)
    }
