"""What benches need besides the core of all timing: memory that stays, graphs, equal results."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable

import torch

from vitprune_fast.scoring.graphs import captured
from vitprune_fast.timing import measure

# a graph holds as many calls as take about this long, so that the start of a replay does not count
GRAPH_S = 1e-3
MOST_IN_A_GRAPH = 50


def keep_freed_memory(up_to: int = 2**30) -> None:
    """Have glibc keep what was freed, as it does in the long run of a training.

    Else results of some megabytes are given back and asked for again at every call, or not, by
    chance of what lies next to them, and page faults are what is measured.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, up_to)


def host_seconds(call: Callable[[], object], rounds: int = 20) -> float:
    """What the host needs for one call on a GPU: the least, while the device has nothing to do.

    One call at a time: a queue of more than about a thousand launches makes the host wait.
    """
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        best = min(best, measure(call, "cpu", clock=time.perf_counter))
    torch.cuda.synchronize()
    return best


def calls_in_a_graph(seconds: float) -> int:
    """How many calls of so many seconds to capture together."""
    return max(1, min(MOST_IN_A_GRAPH, round(GRAPH_S / max(seconds, 1e-9))))


def in_a_graph(call: Callable[[], object]) -> tuple[Callable[[], None], int]:
    """What replays calls on a GPU as one graph, and how many they are.

    Raises:
        RuntimeError: the call does what a graph cannot hold.
    """
    number = calls_in_a_graph(measure(call, "cuda", 3))
    return captured(call, number)[0], number


# how far forms may differ, as a share of the largest number: rounding of the shortest dtype among
# the results, and for fp32 of sums over a few thousand products
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(result: torch.Tensor | Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    """The tensors of a result that is one of them, or several with None for what is not made."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for tensor in result if tensor is not None]


# 0 for equal results, or the dtype whose rounding they may be apart by; None is their own
Within = float | torch.dtype | None


def check_same(
    label: str, ours: list[torch.Tensor], others: list[torch.Tensor], within: Within = None
) -> None:
    """Fail, saying where, unless two forms have the same result."""
    if len(ours) != len(others):
        raise AssertionError(f"{label} must have {len(ours)} results like ours, got {len(others)}")
    if within is None:
        tolerance = max(TOLERANCES[our.dtype] for our in ours)
    else:
        tolerance = TOLERANCES[within] if isinstance(within, torch.dtype) else within
    for number, (our, other) in enumerate(zip(ours, others, strict=True)):
        if our.shape != other.shape:
            shapes = f"{tuple(our.shape)} like ours, got {tuple(other.shape)}"
            raise AssertionError(f"{label} must have result {number} of shape {shapes}")
        if not our.numel():
            continue
        wanted, got = our.double(), other.double()
        limit = tolerance * wanted.abs().max().item()
        error = (got - wanted).abs().max().item()
        # also false for NaN
        if not error <= limit:
            raise AssertionError(
                f"{label} must have result {number} within {limit:.2e} of ours, got {error:.2e}"
            )
