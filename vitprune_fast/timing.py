"""Seconds of calls: of one thread on the processor, or on a GPU between events of its stream.

Forms of one thing take turns, so that a change of the machine's load meets them all. Of a form its
least time counts; how far the median lies above it shows the noise.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def measure(
    call: Callable[[], object],
    device: torch.device | str,
    repeats: int = 1,
    clock: Callable[[], float] | None = None,
) -> float:
    """Seconds of one call, from ``repeats`` of them in a row.

    Args:
        call: what is timed.
        device: where it computes.
        repeats: at least 1.
        clock: what is read on a processor, in seconds; by default the time of this thread.
    """
    device = torch.device(device)
    if device.type != "cuda":
        clock = clock or time.thread_time
        started = clock()
        for _ in range(repeats):
            call()
        return (clock() - started) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # the device that computes need not be the current one
    stream = torch.cuda.current_stream(device)
    start.record(stream)
    for _ in range(repeats):
        call()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def in_turns(
    forms: Mapping[Name, Callable[[], float]], rounds: int, *, warm_up: bool = True
) -> dict[Name, list[float]]:
    """The seconds that each form says of itself, in every round in another order.

    Args:
        forms: by their names; each runs once and says its seconds.
        rounds: how often each is heard.
        warm_up: whether all of them run once unheard before the first round.
    """
    times: dict[Name, list[float]] = {name: [] for name in forms}
    for form in forms.values() if warm_up else ():
        form()
    # whoever comes after a form that left the caches full of something else pays for it
    order, shuffle = list(forms), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(forms[name]())
    return times


def spread(taken: Sequence[float]) -> float:
    """How far the median lies above the least, as a share."""
    return statistics.median(taken) / min(taken) - 1


@dataclass(frozen=True)
class Entry:
    """One form in a race of steps over a batch of images.

    Args:
        name: of the form.
        seconds: the least time for one batch.
        spread: how far the median lies above it, as a share.
        images_per_s: at that time.
        times_ours: its time over that of our form.
        of_limit: share of the arithmetic limit; None for forms without one.
        note: how it was measured, where that is special.
        taken: seconds of every round.
    """

    name: str
    seconds: float
    spread: float
    images_per_s: float
    times_ours: float
    of_limit: float | None = None
    note: str = ""
    taken: tuple[float, ...] = ()


def entries_of(times: Mapping[str, Sequence[float]], batch: int, ours: str) -> list[Entry]:
    """What forms that took turns needed for a batch of images, beside the one that is ours."""
    best, least = {name: min(taken) for name, taken in times.items()}, min(times[ours])
    return [
        Entry(name, s, spread(times[name]), batch / s, s / least, taken=tuple(times[name]))
        for name, s in best.items()
    ]
