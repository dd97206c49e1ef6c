"""Sizes of the tiles of the attention kernels, and how their programs run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitprune_fast.kernels._launch import INTERPRETED, capability, cdiv, next_power_of_2

# the operands of a matrix product have at least this many rows and columns
SMALLEST_TILE = 16
# for these lengths the keys are three static tiles of 128 + 64 + 16, and softmax needs no
# correction of what was summed before; all ViTs at 224 pixels with patches of 16 are here
ROW_TOKENS = range(193, 209)


class Tiles(NamedTuple):
    """Queries and keys of one tile, and how a program runs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# what a bench compares the choices below with on a GPU: for heads of 64 dims in 16 bits, where
# tiles are large and there is no key mask; tests/compiled knows that none spills
CANDIDATES = {
    "forward": {"online": Tiles(64, 64, 4, 2), "tall": Tiles(128, 64, 8, 2)},
    "queries": {"tall": Tiles(128, 64, 8, 2)},
}
_forced: dict[str, str] = {}


@contextmanager
def forced(**names: str) -> Iterator[None]:
    """Launches inside take these candidates where they fit: ``with forced(forward="tall"):``.

    For benches, and for one thread at a time. ValueError where there is no such candidate.
    """
    for launch, name in names.items():
        known = sorted(CANDIDATES.get(launch, ()))
        if name not in known:
            raise ValueError(f"forced: {launch} must be one of {known}, got {name!r}")
    before = dict(_forced)
    _forced.update(names)
    launches.cache_clear()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        launches.cache_clear()


def _candidate(
    launch: str, head_dim: int, dtype: torch.dtype, large: bool, masked: bool = False
) -> Tiles | None:
    fits = head_dim == 64 and dtype.itemsize == 2 and large and not masked
    return CANDIDATES[launch][_forced[launch]] if launch in _forced and fits else None


def pieces(head_dim: int) -> tuple[int, int]:
    """Powers of two that cover a head dim: two where that is less than one, else one and 0."""
    whole = max(next_power_of_2(head_dim), SMALLEST_TILE)
    first = whole // 2
    second = max(next_power_of_2(head_dim - first), SMALLEST_TILE)
    return (first, second) if first >= SMALLEST_TILE and second < first else (whole, 0)


def tail(num_tokens: int, block: int) -> int:
    """Width of the last tile; 0 when whole tiles of ``block`` cover the tokens."""
    rest = num_tokens % block
    return max(next_power_of_2(rest), SMALLEST_TILE) if rest else 0


def has_large_tiles(major: int) -> bool:
    """Whether the tensor cores of that compute capability take tiles of 64 rows from shared memory.

    Hopper and the data-centre Blackwells do; others want smaller tiles, held in registers.
    """
    return 9 <= major <= 11


def takes_row(num_tokens: int, head_dim: int, dtype: torch.dtype, large: bool) -> bool:
    """Whether the forward keeps whole rows of logits: they spill where numbers are wider.

    There the head dim is one piece.
    """
    if _candidate("forward", head_dim, dtype, large):
        return False
    fits = head_dim <= 64 and pieces(head_dim)[1] == 0 and dtype.itemsize == 2
    return num_tokens in ROW_TOKENS and fits and large


def forward_tiles(head_dim: int, dtype: torch.dtype, large: bool, masked: bool = False) -> Tiles:
    """Tiles of the forward. Chosen, as all, so that nothing spills (tests/compiled).

    A key mask needs registers for its bits.
    """
    if candidate := _candidate("forward", head_dim, dtype, large, masked):
        return candidate
    if dtype.itemsize == 4:
        return Tiles(32 if head_dim <= 64 else 16, 32, 8, 2)
    block_n = 32 if masked and head_dim > (96 if large else 80) else 64
    return Tiles(64 if large or head_dim <= 96 else 32, block_n, 4, 2)


def query_tiles(head_dim: int, dtype: torch.dtype, large: bool, masked: bool = False) -> Tiles:
    """Tiles of the backward's first launch."""
    if candidate := _candidate("queries", head_dim, dtype, large, masked):
        return candidate
    if dtype.itemsize == 4:
        return Tiles(32, 32, 4, 2) if head_dim <= 64 else Tiles(16, 32, 8, 2)
    if large:
        return Tiles(64, 64 if head_dim <= 96 else 32, 4, 2)
    if masked:
        return Tiles(64 if head_dim <= 80 else 16, 32, 4, 2)
    return Tiles(64 if head_dim <= 96 else 32, 32, 4, 2)


def key_tiles(head_dim: int, dtype: torch.dtype, large: bool, masked: bool = False) -> Tiles:
    """Tiles of the backward's second launch."""
    if dtype.itemsize == 4:
        return Tiles(32, 32, 4, 2) if head_dim <= 64 else Tiles(32, 16, 8, 2)
    if masked and not large:
        return Tiles(16 if 64 < head_dim <= 80 else 32, 32 if head_dim <= 80 else 16, 4, 2)
    return Tiles(32, 64 if large or head_dim <= 80 else 32, 4, 2)


def precision(dtype: torch.dtype) -> str:
    # tf32 would leave 10 bits of fp32 numbers; 16-bit numbers have no choice
    return "ieee" if dtype == torch.float32 else "tf32"


def large_tiles_of(x: Tensor) -> bool:
    # the interpreter runs what the newer GPUs would
    return not x.is_cuda or has_large_tiles(capability(x.device))


class Launch(NamedTuple):
    """How one kernel is started: its flags, and the programs that share the tokens of a head."""

    flags: dict[str, Any]
    blocks: int


# a model has a few of these; computing them again for every call would take host time
@lru_cache(maxsize=1024)
def launches(
    num_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    large: bool,
    gated: bool,
    listed: bool,
    compact: bool,
    masked: bool,
) -> tuple[Launch, Launch, Launch]:
    """Of the forward, and of the backward's first and second kernel."""
    k0, k1 = pieces(head_dim)
    constants = {
        "NUM_TOKENS": num_tokens,
        "HEAD_DIM": head_dim,
        "K0": k0,
        "K1": k1,
        "GATED": gated,
        "LISTED": listed,
        "COMPACT": compact,
        "KEY_MASK": masked,
        "PRECISION": precision(dtype),
        "UPCAST": INTERPRETED,
    }

    def launch(tiles: Tiles, own: int, walked: int, **flags: bool) -> Launch:
        how = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
        rest = {"TAIL": tail(num_tokens, walked), **flags}
        return Launch({**constants, **blocks, **rest, **how}, cdiv(num_tokens, own))

    forward = forward_tiles(head_dim, dtype, large, masked)
    queries = query_tiles(head_dim, dtype, large, masked)
    keys = key_tiles(head_dim, dtype, large, masked)
    rows = takes_row(num_tokens, head_dim, dtype, large) and not masked
    return (
        launch(forward, forward.block_m, forward.block_n, WHOLE_ROWS=rows),
        launch(queries, queries.block_m, queries.block_n),
        launch(keys, keys.block_n, keys.block_m),
    )


def with_near_tokens(x: Tensor) -> Tensor:
    """``x``, copied when the offsets inside a tile would not fit in 32 bits."""
    return x if x.stride(1) < 2**23 else x.contiguous()
