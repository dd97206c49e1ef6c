"""gather on the CPU against index_select and indexing: weights of a ViT-B, half of them kept."""

from __future__ import annotations

import pytest
import torch

from bench.shapes import VIT_BASE
from vitprune_fast import ops


def half(size: int, unit: int = 1) -> torch.Tensor:
    """Ascending numbers of a random half of the units of `unit` neighbours each."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(size // unit, generator=generator)[: size // unit // 2].sort().values
    return (kept[:, None] * unit + torch.arange(unit)).flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_gather_columns_of_neurons(race, dtype):
    weight = torch.randn(VIT_BASE.width, VIT_BASE.hidden).to(dtype)
    columns = half(VIT_BASE.hidden)
    race(
        "gather",
        f"ViT-B fc2 {tuple(weight.shape)}, half of the columns, {dtype}",
        {
            "vitprune": lambda: ops.gather(weight, columns=columns, backend="cpu"),
            "index_select": lambda: weight.index_select(1, columns),
            "w[:, idx]": lambda: weight[:, columns],
        },
        device="cpu",
        bytes_moved=weight.nbytes + weight.nbytes // 2,
        exact=True,
    )


def bench_gather_columns_of_heads(race):
    weight = torch.randn(VIT_BASE.width, VIT_BASE.width)
    columns = half(VIT_BASE.width, VIT_BASE.head_dim)
    race(
        "gather",
        f"ViT-B proj {tuple(weight.shape)}, columns of half of the heads",
        {
            "vitprune": lambda: ops.gather(weight, columns=columns, backend="cpu"),
            "index_select": lambda: weight.index_select(1, columns),
            "w[:, idx]": lambda: weight[:, columns],
        },
        device="cpu",
        bytes_moved=weight.nbytes,
        exact=True,
    )


def bench_gather_rows(race):
    weight = torch.randn(VIT_BASE.hidden, VIT_BASE.width)
    rows = half(VIT_BASE.hidden)
    race(
        "gather",
        f"ViT-B fc1 {tuple(weight.shape)}, half of the rows",
        {
            "vitprune": lambda: ops.gather(weight, rows, backend="cpu"),
            "index_select": lambda: weight.index_select(0, rows),
            "w[idx]": lambda: weight[rows],
        },
        device="cpu",
        bytes_moved=weight.nbytes,
        exact=True,
    )


def bench_gather_rows_and_columns(race):
    weight = torch.randn(VIT_BASE.width, VIT_BASE.hidden)
    rows, columns = half(VIT_BASE.width), half(VIT_BASE.hidden)
    race(
        "gather",
        f"ViT-B fc2 {tuple(weight.shape)}, half of the rows and columns",
        {
            "vitprune": lambda: ops.gather(weight, rows, columns, backend="cpu"),
            "index_select twice": lambda: weight.index_select(0, rows).index_select(1, columns),
            "w[rows][:, idx]": lambda: weight[rows][:, columns],
        },
        device="cpu",
        bytes_moved=weight.nbytes // 2 + weight.nbytes // 4,
        exact=True,
    )
