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
from vitprune_fast.ranks import Ranks
from vitprune_fast.run.step import RunStopped

# one process may refit or evaluate a large model while the others wait
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
            work: is called in the first process only, and returns what JSON can hold.
        """
        if self.ranks.world == 1:
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
    """The processes that `torchrun` or the caller started; one alone is a run of one process."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        ranks = Ranks.current()
        group = None
        if ranks.world > 1:
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield Together(ranks, group)
    finally:
        if started:
            dist.destroy_process_group()


def own_device(device: str) -> str:
    """The GPU of this process, where several share a machine."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or Ranks.current().world == 1 or not torch.cuda.is_available():
        return device
    return f"cuda:{local}" if device in ("auto", "cuda") else device
