"""What the processes of a score run exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import StageFailed
from ..ranks import Ranks
from .scores import Partial


def exchange(
    ranks: Ranks,
    compute: Callable[[], Partial] | None,
    lengths: Sequence[int],
    first: int,
    width: int,
    keeps_rows: bool = False,
) -> list[Partial]:
    """Do this process' micro-batch of a round and get those of all, in stream order.

    Args:
        ranks: the processes.
        compute: does the work; None where this process has none in the round.
        lengths: samples of each micro-batch of the round.
        first: number of the first of them.
        width: units of all axes.
        keeps_rows: whether the rows themselves are exchanged too.

    Raises:
        StageFailed: another process failed; every process raises.
    """
    if ranks.world == 1:
        return [] if compute is None else [compute()]
    partial, error = Partial(torch.empty(0), torch.zeros(2).long(), torch.empty(0, width)), None
    try:
        partial = partial if compute is None else compute()
    # the others have to know first, or they would wait for this process for ever
    except Exception as caught:
        error = caught
    device = ranks.device
    status = torch.tensor([error is not None, *partial.counts.tolist()])
    found = ranks.gather(status.to(device))
    if error is not None:
        raise error
    if failed := [rank for rank, (flag, *_) in enumerate(found) if int(flag)]:
        raise StageFailed(f"score: every process must succeed, got a failure in rank {failed[0]}")
    sums = ranks.gather(_padded(partial.sums, (width,), device))
    rows: list[Tensor | None] = [None] * ranks.world
    if keeps_rows:
        shape = (max(lengths), width)
        rows = [*ranks.gather(_padded(partial.rows, shape, device))]
    ordered = []
    for number, length in enumerate(lengths, first):
        owner = number % ranks.world
        kept = rows[owner]
        kept = None if kept is None else kept[:length].cpu()
        ordered.append(Partial(sums[owner].cpu(), found[owner][1:].cpu(), kept))
    return ordered


def _padded(value: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """fp64 zeros of ``shape`` that begin with ``value``: what is exchanged has one size."""
    padded = torch.zeros(shape, dtype=torch.float64, device=device)
    if value is not None:
        padded[: len(value)].copy_(value)
    return padded
