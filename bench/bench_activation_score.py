"""activation_score against torch's own backward followed by the score: one MLP of a ViT-B."""

from __future__ import annotations

import pytest
import torch

from bench.place import CPU, Place
from bench.shapes import VIT_BASE
from vitprune_fast.ops import activation_score
from vitprune_fast.reference.activation_score import activation_score as plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
gelu_backward = torch.ops.aten.gelu_backward


def run(race, place: Place, batch: int, dtype: torch.dtype) -> None:
    """Two races of one layer: for both results, and ours against torch's gradient alone."""
    sizes, dtype, backend = place.shape(VIT_BASE), place.dtype(dtype), place.backend
    shape = (place.batch(batch), sizes.tokens, sizes.hidden)
    x, grad = (torch.randn(shape, device=place.device).to(dtype) for _ in range(2))
    # a hook would have kept it
    h = torch.nn.functional.gelu(x)
    forms = {"vitprune": lambda: activation_score(x, grad, backend=backend)}
    if place.compiled:
        compiled = torch.compile(plain)
        forms["torch.compile"] = lambda: compiled(x, grad)
    else:
        forms["gelu_backward, then (h * grad).sum"] = lambda: (
            gelu_backward(grad, x),
            (h * grad).sum(1, dtype=torch.float32),
        )
        forms["plain torch"] = lambda: plain(x, grad)
    name = f"ViT-B gelu {shape}, {str(dtype).removeprefix('torch.')}"
    race("activation_score", name, forms, device=place.device, bytes_moved=3 * x.nbytes)
    if place.compiled:
        return
    alone = {
        "vitprune, score included": lambda: activation_score(x, grad, backend=backend)[0],
        "gelu_backward alone": lambda: gelu_backward(grad, x),
    }
    case = f"{name}, the gradient"
    race("activation_score", case, alone, device=place.device, bytes_moved=3 * x.nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_activation_score_cpu(race, dtype):
    run(race, CPU, 4, DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def bench_activation_score_gpu(race, gpu, dtype):
    run(race, gpu, 256, DTYPES[dtype])
