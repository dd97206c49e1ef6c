"""The processes that share the work of a call (torch.distributed; gloo and NCCL)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from vitprune_fast.errors import StageFailed

_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as if there were no others, which wait for it somewhere."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


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
        """The processes of an initialised group; this one where there is none, or it is alone."""
        if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether this process does the micro-batch of that number."""
        return number % self.world == self.rank

    def share_of(self, count: int, start: int = 0) -> range:
        """The numbers from ``start`` rounds of all processes on that this process does."""
        return range(start * self.world + self.rank, count, self.world)

    def gather(self, value: Tensor) -> list[Tensor]:
        """The value of every process, by rank; all of them call, with one shape and dtype.

        Args:
            value: on :attr:`device`.
        """
        parts = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(parts, value, group=self._group)
        return parts

    def texts(self, text: str) -> list[str]:
        """The text of every process, by rank; all of them call."""
        if self.world == 1:
            return [text]
        content = torch.tensor([*text.encode()], dtype=torch.uint8, device=self.device)
        counts = self.gather(torch.tensor([len(content)], device=self.device))
        sizes = [int(count) for count in counts]
        padded = content.new_zeros(max(sizes))
        padded[: len(content)] = content
        found = zip(self.gather(padded), sizes, strict=True)
        return [bytes(part[:size].tolist()).decode() for part, size in found]

    def wait(self) -> None:
        """Until all processes have called."""
        self.texts("")

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process; all of them call."""
        if self.world == 1:
            return flag
        return any(map(int, self.gather(torch.tensor([int(flag)], device=self.device))))

    def first_does(self, stage: str, work: Callable[[], Any]) -> None:
        """Have the first process do something that is done for all when this returns; all call.

        Without the wait, another process could look for a file before it is there, or gone.

        Args:
            stage: what the error sentence begins with.
            work: called in the first process only; all processes stay in step where it fails.

        Raises:
            StageFailed: it failed, in the other processes; the first raises its own error.
        """
        failed = None
        if self.is_first:
            try:
                work()
            except Exception as error:
                failed = error
        if self.any(failed is not None):
            raise failed or StageFailed(
                f"{stage}: every process must succeed, got a failure in process 0; see what it said"
            )

    def agree(self, found: Any, rule: str, fix: str) -> None:
        """Make sure that all processes found the same; all of them call.

        Args:
            found: by this one; what is compared is its text.
            rule: the error sentence up to what was got.
            fix: what to do.

        Raises:
            StageFailed: another process found something else; every process raises.
        """
        every = self.texts(str(found))
        for rank, other in enumerate(every):
            if other != every[0]:
                raise StageFailed(
                    f"{rule}, got {every[0]} in process 0 and {other} in process {rank}; {fix}"
                )

    def sent_by(
        self, rank: int, tensors: Sequence[Tensor] | None, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Tensors of one process.

        Args:
            rank: whose.
            tensors: there; None elsewhere. All processes call.
            device: where they are wanted.
        """
        if self.world == 1:
            assert tensors is not None
            return tuple(tensors)
        said = [[[*t.shape], str(t.dtype).removeprefix("torch.")] for t in tensors or ()]
        shapes = json.loads(self.texts(json.dumps(said))[rank])
        parts = []
        for number, (shape, dtype) in enumerate(shapes):
            part = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            if tensors is not None:
                part.copy_(tensors[number])
            dist.broadcast(part, group=self._group, group_src=rank)
            parts.append(part.to(device))
        return tuple(parts)

    @property
    def device(self) -> torch.device:
        """Where the group's backend wants tensors."""
        if dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
