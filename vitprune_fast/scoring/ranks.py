"""The processes that share a score run (torch.distributed; gloo and NCCL)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import StageFailed
from .scores import Partial


class Ranks:
    """This process among those of a group.

    Args:
        rank: of this process, from 0.
        world: number of processes.
        group: of torch.distributed; None is the default one.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None):
        self.rank = rank
        self.world = world
        self._group = group

    @classmethod
    def current(cls, group: Any = None) -> Ranks:
        """The processes of an initialised group; this one alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether this process does the micro-batch of that number."""
        return number % self.world == self.rank

    def exchange(
        self,
        compute: Callable[[], Partial] | None,
        lengths: Sequence[int],
        first: int,
        width: int,
        keeps_rows: bool = False,
    ) -> list[Partial]:
        """Do this process' micro-batch of a round and get those of all, in stream order.

        Args:
            compute: does the work; None where this process has none in the round.
            lengths: samples of each micro-batch of the round.
            first: number of the first of them.
            width: units of all axes.
            keeps_rows: whether the rows themselves are exchanged too.

        Raises:
            StageFailed: another process failed; every process raises.
        """
        if self.world == 1:
            return [] if compute is None else [compute()]
        partial, error = None, None
        try:
            partial = compute() if compute is not None else None
        # told to the others first, who would wait for this process for ever
        except Exception as caught:
            error = caught
        device = self._device()
        status = torch.tensor([error is not None, 0, 0])
        if partial is not None:
            status[1:] = partial.counts.cpu()
        found = self._gather(status.to(device))
        if error is not None:
            raise error
        if failed := [rank for rank, (flag, *_) in enumerate(found) if int(flag)]:
            raise StageFailed(
                f"score: every process must succeed, got a failure in rank {failed[0]}"
            )
        sums = self._gather(_padded(None if partial is None else partial.sums, (width,), device))
        rows: list[Tensor | None] = [None] * self.world
        if keeps_rows:
            shape = (max(lengths), width)
            rows = [
                *self._gather(_padded(None if partial is None else partial.rows, shape, device))
            ]
        ordered = []
        for number, length in enumerate(lengths, first):
            owner = number % self.world
            kept = rows[owner]
            kept = None if kept is None else kept[:length].cpu()
            ordered.append(Partial(sums[owner].cpu(), found[owner][1:].cpu(), kept))
        return ordered

    def agree_on_done(self, done: int) -> None:
        """Make sure that the checkpoint of every process holds as many micro-batches.

        Raises:
            StageFailed: they differ.
        """
        if self.world == 1:
            return
        found = [int(n) for n in self._gather(torch.tensor([done], device=self._device()))]
        if len(set(found)) > 1:
            raise StageFailed(
                "score: checkpoint must hold as many micro-batches in every process, got "
                f"{found}; give a file that all of them can read, or delete it to start anew"
            )

    def _gather(self, value: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(parts, value, group=self._group)
        return parts

    def _device(self) -> torch.device:
        """Where the group's backend wants tensors."""
        if dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def _padded(value: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """fp64 zeros of ``shape`` that begin with ``value``: what is exchanged has one size."""
    padded = torch.zeros(shape, dtype=torch.float64, device=device)
    if value is not None:
        padded[: len(value)].copy_(value)
    return padded
