"""The core of all timing, on clocks that are lists of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch

from vitprune_fast.timing import (
    entries_of,
    in_turns,
    measure,
    spread,
)


def reading(*numbers: float) -> Callable[[], float]:
    """A clock that shows these, one after another."""
    return iter(numbers).__next__


def test_a_call_takes_its_share_of_what_lies_between_two_readings() -> None:
    calls: list[int] = []
    seconds = measure(lambda: calls.append(1), "cpu", 4, reading(10.0, 12.0))
    assert seconds == 0.5 and len(calls) == 4


def test_on_a_gpu_events_lie_on_the_stream_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            log.append(stream)

        def synchronize(self) -> None:
            log.append("waited")

        def elapsed_time(self, end: Event) -> float:
            assert log[-1] == "waited" and end is not self
            return 3000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert measure(lambda: log.append("call"), "cuda:1", 2) == 1.5
    assert log == ["stream of cuda:1", "call", "call", "stream of cuda:1", "waited"]


def test_forms_take_turns_in_another_order_every_round() -> None:
    heard: list[str] = []

    def form(name: str, seconds: Iterable[float]) -> Callable[[], float]:
        left = iter(seconds)

        def say() -> float:
            heard.append(name)
            return next(left)

        return say

    forms = {name: form(name, range(number, 99)) for number, name in enumerate("abc")}
    times = in_turns(forms, 20)
    # what the first, unheard calls said is left out
    assert times == {name: [*range(start, start + 20)] for start, name in enumerate("abc", 1)}
    assert heard[:3] == ["a", "b", "c"]
    rounds = ["".join(heard[start : start + 3]) for start in range(3, len(heard), 3)]
    assert len(rounds) == 20 and all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({*rounds}) == 6
    assert in_turns({"a": form("a", [5.0, 7.0])}, 2, warm_up=False) == {"a": [5.0, 7.0]}


def test_an_entry_is_the_least_time_beside_ours() -> None:
    times = {"ours": [3.0, 2.0, 4.0], "peer": [8.0, 8.0, 6.0]}
    ours, peer = entries_of(times, 12, "ours")
    assert (ours.name, ours.seconds, ours.images_per_s, ours.times_ours) == ("ours", 2, 6, 1)
    assert (peer.name, peer.seconds, peer.images_per_s, peer.times_ours) == ("peer", 6, 2, 3)
    assert ours.spread == 0.5 and peer.spread == spread([8.0, 8.0, 6.0]) == pytest.approx(1 / 3)
    assert peer.taken == (8, 8, 6)
