"""gated_glu against torch's activation and products: one gated MLP, halves packed, and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench.place import CPU, Place
from bench.shapes import VIT_BASE_SWIGLU
from vitprune_fast.ops import gated_glu_packed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(race, place: Place, batch: int, dtype: torch.dtype) -> None:
    """One race of forward and backward, with the gradient of the gates."""
    sizes, dtype = place.shape(VIT_BASE_SWIGLU), place.dtype(dtype)
    shape = (place.batch(batch), sizes.tokens, sizes.hidden)
    x = torch.randn(*shape[:2], 2 * sizes.hidden, device=place.device).to(dtype).requires_grad_()
    grad = torch.randn(shape, device=place.device).to(dtype)
    unit = torch.rand(sizes.hidden, device=place.device).requires_grad_()

    def plain(x, unit):
        gate, value = x.tensor_split(2, -1)
        return F.silu(gate) * value * unit.to(x.dtype)

    def there_and_back(form):
        out = form(x, unit)
        return out.detach(), *torch.autograd.grad(out, (x, unit), grad)

    def ours(x, unit):
        return gated_glu_packed(x, unit, gate_last=False, backend=place.backend)

    name, peer = (
        ("torch.compile", torch.compile(plain)) if place.compiled else ("plain torch", plain)
    )
    forms = {"vitprune": lambda: there_and_back(ours), name: lambda: there_and_back(peer)}
    case = f"SwiGLU {shape}, packed, {str(dtype).removeprefix('torch.')}, forward and backward"
    moved = 3 * x.nbytes + 2 * grad.nbytes
    race("gated_glu", case, forms, device=place.device, bytes_moved=moved)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_gated_glu_cpu(race, dtype):
    run(race, CPU, 4, DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def bench_gated_glu_gpu(race, gpu, dtype):
    run(race, gpu, 256, DTYPES[dtype])
