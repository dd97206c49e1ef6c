"""The processes that share the work of a call (torch.distributed; gloo and NCCL)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


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

    def gather(self, value: Tensor) -> list[Tensor]:
        """The value of every process, by rank; all of them call, with one shape and dtype.

        Args:
            value: on :attr:`device`.
        """
        parts = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(parts, value, group=self._group)
        return parts

    @property
    def device(self) -> torch.device:
        """Where the group's backend wants tensors."""
        if dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
