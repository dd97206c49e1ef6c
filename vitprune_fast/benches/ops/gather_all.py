"""gather_all of one matrix and of a whole ViT-B, of which half is kept, against index_select."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch

from vitprune_fast import ops
from vitprune_fast.benches.place import Place
from vitprune_fast.benches.shapes import VIT_BASE
from vitprune_fast.planning import Plan
from vitprune_fast.structure import describe
from vitprune_fast.structure.reading import Reading
from vitprune_fast.surgery.compaction import Compaction


def half(size: int, unit: int = 1) -> torch.Tensor:
    """Ascending numbers of a random half of the units of `unit` neighbours each."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(size // unit, generator=generator)[: size // unit // 2].sort().values
    return (kept[:, None] * unit + torch.arange(unit)).flatten()


def matrix(
    race: Callable,
    place: Place,
    what: str,
    sizes: tuple[int, int],
    rows: int | None,
    columns: int | None,
    dtype: torch.dtype,
    moved: float,
) -> None:
    """One race of a matrix.

    Args:
        race: what runs it.
        place: where.
        what: begins the name of the case, with a place for the sizes.
        sizes: of the matrix.
        rows: neighbours that stay or go together, of which half stays; None leaves all.
        columns: as ``rows``.
        dtype: of the matrix.
        moved: bytes that must be moved, as a share of the matrix.
    """
    weight = torch.randn(sizes).to(dtype)
    units = zip(sizes, (rows, columns), strict=True)
    picked = [None if unit is None else half(size, unit) for size, unit in units]
    numbers = (None if index is None else index.numpy() for index in picked)
    table = ops.GatherTable([ops.Selection(sizes, *numbers)])
    first, second = picked
    peers: dict[str, Callable]
    if first is None:
        assert second is not None
        peers = {
            "index_select": lambda: weight.index_select(1, second),
            "w[:, idx]": lambda: weight[:, second],
        }
    elif second is None:
        peers = {
            "index_select": lambda: weight.index_select(0, first),
            "w[idx]": lambda: weight[first],
        }
    else:
        peers = {
            "index_select twice": lambda: weight.index_select(0, first).index_select(1, second),
            "w[rows][:, idx]": lambda: weight[first][:, second],
        }
    race(
        "gather_all",
        what.format(sizes),
        {"vitprune": lambda: ops.gather_all([weight], table, backend=place.backend)[0], **peers},
        device="cpu",
        bytes_moved=round(moved * weight.nbytes),
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


def cases(place: Place) -> dict[str, Callable]:
    """By the names of the cases, what runs a race of each."""

    def whole(copies: int, dtype: torch.dtype | None = None) -> Callable:
        return partial(compaction_case, place=place, copies=copies, dtype=dtype)

    if place.is_for_a_gpu:
        return {"moments": whole(3), "moments-average": whole(4), "cast": whole(1, torch.bfloat16)}
    shape, fp32 = place.shape(VIT_BASE), torch.float32
    fc1, fc2 = (shape.hidden, shape.width), (shape.width, shape.hidden)
    proj, dim = (shape.width, shape.width), shape.head_dim
    one = partial(partial, matrix, place=place)
    return {
        **{
            f"columns-{name}": one(
                what=f"ViT-B fc2 {{}}, half of the columns, {dtype}",
                **{"sizes": fc2, "rows": None, "columns": 1, "dtype": dtype, "moved": 1.5},
            )
            for name, dtype in (("fp32", fp32), ("bf16", torch.bfloat16))
        },
        "columns of heads": one(
            what="ViT-B proj {}, columns of half of the heads",
            **{"sizes": proj, "rows": None, "columns": dim, "dtype": fp32, "moved": 1.0},
        ),
        "rows": one(
            what="ViT-B fc1 {}, half of the rows",
            **{"sizes": fc1, "rows": 1, "columns": None, "dtype": fp32, "moved": 1.0},
        ),
        "rows and columns": one(
            what="ViT-B fc2 {}, half of the rows and columns",
            **{"sizes": fc2, "rows": 1, "columns": 1, "dtype": fp32, "moved": 0.75},
        ),
        "with state": whole(4),
        "cast": whole(1, torch.bfloat16),
    }
