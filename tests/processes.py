"""Several processes that share a job, as a launcher starts them.

They are forked from one process that has imported everything, so that they cost what the job costs.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

IMPORTED_ONCE = ["torch.distributed", "vitprune_fast.recipes.start", "vitprune_fast.testing"]


def together(*asked: Any, **options: Any) -> list[Any]:
    """What ``outcomes`` finds, where every process must succeed."""
    found = outcomes(*asked, **options)
    assert all(succeeded for succeeded, _ in found), found
    return [value for _, value in found]


def outcomes(
    world: int,
    function: Callable[..., Any],
    *words: Any,
    store: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[tuple[bool, Any]]:
    """What ``function(rank, *words)`` comes to in each of the processes.

    Args:
        world: number of processes, with one thread each.
        function: of a module, so that it can be named to another process.
        *words: what else it is given.
        store: a file that is not there yet: the processes join a group by it, before the call.
        environment: what else is set in theirs.

    Returns:
        (True, the value) or (False, the traceback) of each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    started = []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        setting = {**(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        setting |= {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        work = (theirs, function, rank, words, store, setting)
        process = context.Process(target=_work, args=work)
        process.start()
        theirs.close()
        started.append((process, ours))
    return [_answer(process, ours) for process, ours in started]


def _answer(process: Any, ours: Connection) -> tuple[bool, Any]:
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        answer = (False, f"exit code {process.exitcode}")
    process.join()
    return answer


def _work(
    theirs: Connection,
    function: Callable[..., Any],
    rank: int,
    words: Sequence[Any],
    store: Path | None,
    setting: Mapping[str, str],
) -> None:
    import torch
    from torch import distributed as dist

    os.environ.update(setting)
    # as in a process that a launcher starts; else what it starts itself would import all again
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    try:
        if store is not None:
            world = int(setting["WORLD_SIZE"])
            dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
        value = function(rank, *words)
        if store is not None:
            dist.destroy_process_group()
    except Exception:
        theirs.send((False, traceback.format_exc()))
    else:
        theirs.send((True, value))
