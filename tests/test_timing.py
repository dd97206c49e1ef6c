"""The core of all timing, on clocks that are lists of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from vitprune_fast.timing import (
    Stopwatch,
    calls_in_a_graph,
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


def test_a_stopwatch_marks_moments_between_which_others_may_lie() -> None:
    watch = Stopwatch("cpu", reading(1.0, 2.0, 4.0))
    marks = [watch.mark() for _ in range(3)]
    assert watch.seconds(marks[0], marks[2]) == 3 and watch.seconds(marks[1], marks[2]) == 2


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


def test_an_entry_is_the_least_time_beside_ours() -> None:
    times = {"ours": [3.0, 2.0, 4.0], "peer": [8.0, 8.0, 6.0]}
    ours, peer = entries_of(times, 12, "ours", {"peer": "a note"}, {"ours": 1.0})
    assert (ours.seconds, ours.images_per_s, ours.times_ours, ours.of_limit) == (2, 6, 1, 0.5)
    assert (peer.seconds, peer.images_per_s, peer.times_ours, peer.of_limit) == (6, 2, 3, None)
    assert (ours.note, peer.note) == ("", "a note") and peer.taken == (8, 8, 6)
    assert ours.spread == 0.5 and peer.spread == spread([8.0, 8.0, 6.0]) == pytest.approx(1 / 3)


def test_a_graph_holds_about_a_millisecond() -> None:
    assert [calls_in_a_graph(seconds) for seconds in (1.0, 1e-3, 1e-4, 0.0)] == [1, 1, 10, 50]
