"""taylor_score against plain torch: one layer of a ViT-B, neurons and heads."""

from __future__ import annotations

import pytest
import torch

from bench.shapes import VIT_BASE
from vitprune_fast import ops

UNITS = {"neurons": (VIT_BASE.hidden, 1), "heads": (VIT_BASE.width, VIT_BASE.head_dim)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def forms(activation, gradient, group_size, backend):
    """Ours, and what one would write without us, accumulating in fp32 as ours does."""

    def product_then_sum():
        product = activation.float() * gradient.float()
        return product.sum(1).unflatten(1, (-1, group_size)).sum(2)

    def einsum():
        a, g = (x.float().unflatten(2, (-1, group_size)) for x in (activation, gradient))
        return torch.einsum("bnuk,bnuk->bu", a, g)

    found = {
        "vitprune": lambda: ops.taylor_score(activation, gradient, group_size, backend=backend),
        "(a * g).sum": product_then_sum,
        "einsum": einsum,
    }
    if backend == "triton":
        found["torch.compile"] = torch.compile(product_then_sum)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", UNITS)
def bench_taylor_score_cpu(race, units, dtype):
    columns, group_size = UNITS[units]
    shape = (4, VIT_BASE.tokens, columns)
    activation, gradient = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(2))
    race(
        "taylor_score",
        f"ViT-B {units} {shape}, {dtype}",
        forms(activation, gradient, group_size, "cpu"),
        device="cpu",
        bytes_moved=2 * activation.nbytes,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", UNITS)
def bench_taylor_score_gpu(race, units, dtype):
    columns, group_size = UNITS[units]
    shape = (256, VIT_BASE.tokens, columns)
    activation, gradient = (torch.randn(shape, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    race(
        "taylor_score",
        f"ViT-B {units} {shape}, {dtype}",
        forms(activation, gradient, group_size, "triton"),
        device="cuda",
        bytes_moved=2 * activation.nbytes,
    )
