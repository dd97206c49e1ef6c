"""Seconds of calls: of one thread on the processor, or on a GPU between events of its stream.

Forms of one thing take turns, in every round in another order, so that a change of the machine's
load meets them all. Of a form its least time counts; median and spread show the noise.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitprune_fast.graphs import captured

# a graph holds as many calls as take about this long, so that the start of a replay does not count
GRAPH_S = 1e-3
MOST_IN_A_GRAPH = 50


class Stopwatch:
    """Marks moments of a device, and says how far they lie apart.

    Args:
        device: on a GPU a moment is an event of the current stream, elsewhere a reading of a clock.
        clock: that is read, in seconds; by default the processor time of this thread.

    Attributes:
        mark: gives the present moment.
    """

    def __init__(
        self, device: torch.device | str, clock: Callable[[], float] | None = None
    ) -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self.mark: Callable[[], Any] = self._event if self._on_gpu else clock or time.thread_time

    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments; waits until a GPU has come to the second one."""
        if not self._on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        # the device that computes need not be the current one
        event.record(torch.cuda.current_stream(self._device))
        return event


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
        clock: for a processor, as for :class:`Stopwatch`.
    """
    watch = Stopwatch(device, clock)
    start = watch.mark()
    for _ in range(repeats):
        call()
    return watch.seconds(start, watch.mark()) / repeats


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


def in_turns(forms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each form says of itself, in turns.

    Whoever comes after a form that left the caches full of something else pays for it, so the order
    is another one in every round.

    Args:
        forms: by their names; each runs once and says its seconds. Before the first round all of
            them run once unheard.
        rounds: how often each is heard.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    order, shuffle = list(forms), random.Random(0).shuffle
    for form in forms.values():
        form()
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
        of_limit: share of the arithmetic limit; None for forms that have none.
        note: how it was measured, where that is special.
        taken: the seconds of all rounds.
    """

    name: str
    seconds: float
    spread: float
    images_per_s: float
    times_ours: float
    of_limit: float | None = None
    note: str = ""
    taken: tuple[float, ...] = ()


def entries_of(
    times: Mapping[str, Sequence[float]],
    batch: int,
    ours: str,
    notes: Mapping[str, str],
    limits: Mapping[str, float] | None = None,
) -> list[Entry]:
    """What a race found, form by form.

    Args:
        times: the seconds of all rounds, as of :func:`in_turns`.
        batch: images of a step.
        ours: the form that the others stand beside.
        notes: of the forms that have one.
        limits: the least seconds that arithmetic allows, of the forms that have such a limit.
    """
    best = {name: min(taken) for name, taken in times.items()}
    limits = limits or {}
    return [
        Entry(
            name,
            best[name],
            spread(taken),
            batch / best[name],
            best[name] / best[ours],
            limits[name] / best[name] if name in limits else None,
            notes.get(name, ""),
            tuple(taken),
        )
        for name, taken in times.items()
    ]
