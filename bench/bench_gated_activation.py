"""gated_activation against torch's activation and product: one MLP of a ViT-B, there and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench.place import CPU, Place
from bench.shapes import VIT_BASE
from vitprune_fast.ops import gated_activation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(race, place: Place, batch: int, dtype: torch.dtype) -> None:
    """One race of forward and backward, with the gradient of the gates."""
    sizes, dtype = place.shape(VIT_BASE), place.dtype(dtype)
    shape = (place.batch(batch), sizes.tokens, sizes.hidden)
    x, grad = (torch.randn(shape, device=place.device).to(dtype) for _ in range(2))
    x.requires_grad_()
    gate = torch.rand(sizes.hidden, device=place.device).requires_grad_()

    def plain(x, gate):
        return F.gelu(x) * gate.to(x.dtype)

    def there_and_back(form):
        out = form(x, gate)
        return out.detach(), *torch.autograd.grad(out, (x, gate), grad)

    def ours(x, gate):
        return gated_activation(x, gate, backend=place.backend)

    name, peer = (
        ("torch.compile", torch.compile(plain)) if place.compiled else ("plain torch", plain)
    )
    forms = {"vitprune": lambda: there_and_back(ours), name: lambda: there_and_back(peer)}
    case = f"ViT-B gelu {shape}, {str(dtype).removeprefix('torch.')}, forward and backward"
    race("gated_activation", case, forms, device=place.device, bytes_moved=5 * x.nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_gated_activation_cpu(race, dtype):
    run(race, CPU, 4, DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def bench_gated_activation_gpu(race, gpu, dtype):
    run(race, gpu, 256, DTYPES[dtype])
