"""Races between forms of one op: interleaved, checked equal first.

On a CPU: time of one thread on the processor, so that a busy machine does not count. On a GPU: time
on the stream of calls that are replayed from a graph, and by itself what the host needs for one
call. What is stated is the minimum; median and spread show the noise. The limit is a plain copy
that moves as many bytes, raced against the forms in the same process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitprune_fast.benches.harness import Within, check_same, host_seconds, in_a_graph, tensors
from vitprune_fast.timing import in_turns, measure, spread

ROUNDS = {"cpu": 30, "cuda": 12}
# one measurement repeats the call until it takes about this long
MEASUREMENT_S = 4e-3
# what measures, by device, as entries of pytest-benchmark name their timer
CLOCKS = {"cpu": "thread_time", "cuda": "cuda_events"}
# the limit, which is raced as the forms are
COPY = "a plain copy of as many bytes"


@dataclass(frozen=True)
class Timed:
    """What is timed for a form.

    Args:
        call: runs the form ``calls`` times.
        calls: above 1 for graphs.
        clock: what measures it.
        facts: what a record says of it.
    """

    call: Callable[[], object]
    calls: int
    clock: str
    facts: dict[str, Any]


def timed(call: Callable[[], object], device: str) -> Timed:
    """The call itself, or on a GPU a graph of calls where they can be captured."""
    if device != "cuda":
        return Timed(call, 1, CLOCKS[device], {})
    facts: dict[str, Any] = {"host_us": round(host_seconds(call) * 1e6, 1)}
    try:
        replay, calls = in_a_graph(call)
        return Timed(replay, calls, "graph_replays", {**facts, "timed": "replays of a graph"})
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"cannot be captured: {str(error).splitlines()[0]}")
        return Timed(call, 1, CLOCKS[device], {**facts, "timed": "calls of the host"})


# name of a form, group, seconds of its rounds, facts, clock, its call
Entered = Callable[[str, str, Sequence[float], dict[str, Any], str, Callable], None]


class Race:
    """Checks, times and records the forms of one op; the first is ours.

    Args:
        note: gets every record as it is made.
        entered: gets every form that was timed, with all of its rounds.
        tiny: few rounds, which say nothing about speed.
        suffix: what tells these cases from others of the same name.
        times: whether anything is timed; else forms are only checked.
    """

    def __init__(
        self,
        note: Callable[[dict[str, Any]], None],
        entered: Entered | None = None,
        *,
        tiny: bool = False,
        suffix: str = "",
        times: bool = True,
    ):
        self._note, self._entered = note, entered
        self._tiny, self._suffix, self._times = tiny, suffix, times

    def __call__(
        self,
        op: str,
        case: str,
        forms: dict[str, Callable],
        *,
        device: str,
        bytes_moved: int,
        exact: bool = False,
        computed: torch.dtype | None = None,
        rounds: int | None = None,
    ) -> None:
        """One race, on one thread.

        With ``exact`` the results must be equal, else within the rounding of their dtype, or of the
        one that they are ``computed`` in. A form that has another result is recorded as one that
        disagrees, and not timed; when no other form is like ours, nothing is timed.

        Raises:
            AssertionError: no other form is like ours.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            case += self._suffix
            forms = self._agreeing(op, case, forms, device, 0.0 if exact else computed)
            if self._times:
                self._run(op, case, forms, device, bytes_moved, rounds)
        finally:
            torch.set_num_threads(threads)

    def _agreeing(
        self, op: str, case: str, forms: dict[str, Callable], device: str, within: Within
    ) -> dict[str, Callable]:
        """The forms with our result; what the others have is recorded."""
        (name, ours), *others = forms.items()
        wanted = tensors(ours())
        found, complaints = {name: ours}, []
        for name, other in others:
            try:
                label = f"{op}: form {name!r} of case {case!r}"
                check_same(label, wanted, tensors(other()), within)
            except AssertionError as error:
                record = {"op": op, "case": case, "form": name, "device": device}
                self._note({**record, "disagrees": str(error)})
                complaints.append(str(error))
            else:
                found[name] = other
        if complaints and len(found) == 1:
            raise AssertionError("\n".join(complaints))
        return found

    def _run(
        self,
        op: str,
        case: str,
        forms: dict[str, Callable],
        device: str,
        bytes_moved: int,
        rounds: int | None,
    ) -> None:
        # read and written once each, like the bytes that the op has to move
        source = torch.zeros(bytes_moved // 2, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        raced = {name: timed(call, device) for name, call in forms.items()}
        raced[COPY] = timed(lambda: target.copy_(source), device)

        def turn(form: Timed) -> Callable[[], float]:
            seconds = max(measure(form.call, device, 1 if self._tiny else 3), 1e-7)
            repeats = 1 if self._tiny else max(1, int(MEASUREMENT_S / seconds))
            return lambda: measure(form.call, device, repeats) / form.calls

        turns = {name: turn(form) for name, form in raced.items()}
        # the first measurements of each were those that told how often to repeat it
        times = in_turns(turns, 2 if self._tiny else rounds or ROUNDS[device], warm_up=False)
        limit = min(times.pop(COPY))
        best_of_ours = min(times[next(iter(forms))])
        for name, taken in times.items():
            best, form = min(taken), raced[name]
            facts = {
                "spread": round(spread(taken), 3),
                "gb_per_s": round(bytes_moved / best / 1e9, 1),
                "of_copy": round(limit / best, 3),
                "times_ours": round(best / best_of_ours, 2),
                **form.facts,
            }
            self._note(
                {
                    "op": op,
                    "case": case,
                    "form": name,
                    "device": device,
                    "min_us": round(best * 1e6, 2),
                    "median_us": round(statistics.median(taken) * 1e6, 2),
                    "rounds": len(taken),
                    **facts,
                }
            )
            if self._entered is not None:
                facts["device"] = device
                self._entered(name, f"{op}, {case}", taken, facts, form.clock, forms[name])
