"""The processes of one run: the first owns the folder, the others wait for what it says."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from vitprune_fast import errors
from vitprune_fast.ranks import Ranks, alone
from vitprune_fast.run.step import RunStopped

# the first may time large models while the others wait; of one that is gone they hear at once
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Together:
    """The processes that do a run.

    Attributes:
        ranks: this one among them.
        group: of gloo, for messages; None alone.
    """

    ranks: Ranks
    group: Any = None

    def by_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in the first process, or the error that it raises there.

        Args:
            work: is called in the first process only, which shares nothing meanwhile, and returns
                what JSON can hold.
        """
        if Ranks.current().world == 1:
            return work()
        if not self.ranks.is_first:
            kind, value = json.loads(self._said(None))
            if kind == "value":
                return value
            if kind == RunStopped.__name__:
                raise RunStopped
            known = getattr(errors, kind, None)
            raise errors.VitpruneError(f"{kind}: {value}") if known is None else known(value)
        try:
            with alone():
                value = work()
            said = json.dumps(("value", value))
        except BaseException as error:
            self._said(json.dumps((type(error).__name__, str(error))))
            raise
        self._said(said)
        return value

    def _said(self, text: str | None) -> str:
        """The text of the first process."""
        content = torch.frombuffer(bytearray((text or "").encode() or b" "), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0, group=self.group)
        if text is None:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self.group)
        return bytes(content.tolist()).decode()


@contextlib.contextmanager
def together() -> Iterator[Together]:
    """The processes that `torchrun` or the caller started; one alone is a run of one process.

    Raises:
        StageFailed: another process ended before the body did.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        ranks = Ranks.current()
        group = None
        if ranks.world > 1:
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield Together(ranks, group)
    except RuntimeError as error:
        if not _is_of_the_others(error):
            raise
        raise errors.StageFailed(
            "run: every process must live to the end, got one that is gone; see what it said "
            "itself, and give the same command to go on"
        ) from None
    finally:
        if started:
            dist.destroy_process_group()


def _is_of_the_others(error: RuntimeError) -> bool:
    """Whether it is what a backend says when a process does not answer any more."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    # gloo has no class of its own
    return isinstance(error, dist.DistBackendError) or "gloo/transport" in str(error)


def own_device(device: str) -> str:
    """The GPU of this process, where several share a machine."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or Ranks.current().world == 1 or not torch.cuda.is_available():
        return device
    return f"cuda:{local}" if device in ("auto", "cuda") else device
