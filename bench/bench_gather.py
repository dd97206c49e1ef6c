"""gather_all of one matrix and of a whole ViT-B, of which half is kept, against index_select."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch

from bench.conftest import note_memory
from bench.peak_memory import peak_of_prune
from bench.place import CPU, Place
from bench.shapes import VIT_BASE
from vitprune_fast import ops
from vitprune_fast.planning import Plan
from vitprune_fast.structure import describe
from vitprune_fast.structure.reading import Reading
from vitprune_fast.surgery.compaction import Compaction


def half(size: int, unit: int = 1) -> torch.Tensor:
    """Ascending numbers of a random half of the units of `unit` neighbours each."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(size // unit, generator=generator)[: size // unit // 2].sort().values
    return (kept[:, None] * unit + torch.arange(unit)).flatten()


def gather(weight: torch.Tensor, rows=None, columns=None) -> Callable[[], torch.Tensor]:
    """Our call for one matrix, by a table that is made once."""
    picked = (None if index is None else index.numpy() for index in (rows, columns))
    table = ops.GatherTable([ops.Selection((len(weight), weight.shape[1]), *picked)])
    return lambda: ops.gather_all([weight], table, backend="cpu")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_gather_columns_of_neurons(race, dtype):
    weight = torch.randn(VIT_BASE.width, VIT_BASE.hidden).to(dtype)
    columns = half(VIT_BASE.hidden)
    race(
        "gather_all",
        f"ViT-B fc2 {tuple(weight.shape)}, half of the columns, {dtype}",
        {
            "vitprune": gather(weight, columns=columns),
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
        "gather_all",
        f"ViT-B proj {tuple(weight.shape)}, columns of half of the heads",
        {
            "vitprune": gather(weight, columns=columns),
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
        "gather_all",
        f"ViT-B fc1 {tuple(weight.shape)}, half of the rows",
        {
            "vitprune": gather(weight, rows),
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
        "gather_all",
        f"ViT-B fc2 {tuple(weight.shape)}, half of the rows and columns",
        {
            "vitprune": gather(weight, rows, columns),
            "index_select twice": lambda: weight.index_select(0, rows).index_select(1, columns),
            "w[rows][:, idx]": lambda: weight[rows][:, columns],
        },
        device="cpu",
        bytes_moved=weight.nbytes // 2 + weight.nbytes // 4,
        exact=True,
    )


def half_of_vit_base(place: Place) -> tuple[Any, Compaction]:
    """A ViT-B and the compaction to a random half of its heads and neurons."""
    model = timm.create_model("vit_base_patch16_224", **place.smaller).to(place.device)
    model.requires_grad_(False)
    structure = describe(model)
    axes = [axis for kind in ("head", "neuron") for axis in structure.units(kind)]
    plan = Plan.of(structure, {axis.name: half(axis.size).tolist() for axis in axes})
    return model, Compaction(structure.tensors, Reading(structure, plan))


def one_by_one(sources, selections, out, cast: bool):
    """The loop that one would write: index_select along each dimension that shrinks."""
    for source, indices, target in zip(sources, selections, out, strict=True):
        picks = [(dim, index) for dim, index in enumerate(indices) if index is not None]
        for dim, index in picks[: len(picks) if cast else -1]:
            source = source.index_select(dim, index)
        if picks and not cast:
            torch.index_select(source, *picks[-1], out=target)
        else:
            target.copy_(source)
    return out


def compaction_case(race, place: Place, copies: int, dtype: torch.dtype | None) -> None:
    device = place.device
    model, compaction = half_of_vit_base(place)
    named = [(n, p) for n, p in model.named_parameters() for _ in range(copies)]
    entries = [compaction.entry(name) for name, _ in named]
    table = compaction.table
    shapes = [table.selections[entry].shape for entry in entries]
    sources = [torch.randn(shape, device=device) for shape in shapes]

    def index(array):
        return None if array is None else torch.from_numpy(array).to(device)

    picks = {e: table.selections[e] for e in set(entries)}
    indices = {e: (index(s.rows), index(s.columns)) for e, s in picks.items()}
    selections = [indices[entry] for entry in entries]
    outs = [
        [torch.empty(picks[e].result, dtype=dtype or torch.float32, device=device) for e in entries]
        for _ in range(2)
    ]
    what = {1: f"cast to {dtype}", 3: "with two moments", 4: "with two moments and an average"}[
        copies
    ]
    race(
        "gather_all",
        f"ViT-B, half of the heads and neurons, {what}",
        {
            "vitprune": partial(ops.gather_all, sources, table, entries, out=outs[0]),
            "loop of index_select": partial(
                one_by_one, sources, selections, outs[1], dtype is not None
            ),
        },
        device=device,
        # what stays is read once and written once
        bytes_moved=sum(out.nbytes + out.numel() * 4 for out in outs[0]),
        exact=True,
    )


@pytest.mark.timeout(600)
def bench_gather_all_with_state(race):
    compaction_case(race, CPU, 4, None)


@pytest.mark.timeout(600)
def bench_gather_all_cast(race):
    compaction_case(race, CPU, 1, torch.bfloat16)


def bench_gather_memory_of_prune(request):
    needed, made = peak_of_prune("vit_large_patch16_224")
    case = "ViT-L with the moments of AdamW, half of the heads and neurons, fp32"
    note_memory(request.config, case, "cpu", {"prune": needed, "result": made})


@pytest.mark.gpu
@pytest.mark.parametrize(("copies", "dtype"), [(3, None), (4, None), (1, torch.bfloat16)])
def bench_gather_all_gpu(race, gpu, copies, dtype):
    compaction_case(race, gpu, copies, dtype)
