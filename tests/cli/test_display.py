from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from vitprune_fast.cli import display
from vitprune_fast.cli.display import Display, Pace

HALF = {
    "params": 1000,
    "macs": 4000,
    "top1": 0.98,
    "top1_count": 588,
    "top1_interval": [0.9654, 0.9885],
    "samples": 600,
    "top5": 1.0,
    "latency_ms": 2.0,
    "latency_p90_ms": 2.5,
    "latency_waited": None,
    "latency_ms_batch64": 20.0,
    "images_per_s": 3200.0,
    "peak_memory_bytes": 4_000_000,
    "peak_memory_bytes_batch64": 8_000_000,
    "file_bytes": 1_000_000,
    "depth": 4,
}
SUMMARY = {
    "models": {"before": "dense", "cut": "pruned", "swept": "swept", "after": "model"},
    "made_by": {"before": "dense", "cut": "prune", "swept": "sweep", "after": "distill"},
    "teachers": [{"name": "self", "kind": "self"}],
    "before": HALF,
    "cut": {**HALF, "top1": 0.9, "top1_count": 540, "agreement": 0.91},
    "swept": {**HALF, "top1": 0.97, "top1_count": 582, "agreement": 0.98},
    "after": {
        **HALF,
        "macs": 2000,
        "top1": 0.975,
        "latency_ms": 1.0,
        "images_per_s": 6400.0,
        "peak_memory_bytes": 3_000_000,
        "agreement": 0.99,
    },
}
START = {"val_top1": 0.912, "peak_lr": 2e-5, "distance": 0.1, "reach": 1e-3, "size": 0.02}
EVENTS = [
    {"event": "profile", "profile": "cpu: some processor"},
    {"event": "stage", "stage": "dense", "state": "kept"},
    {"event": "stage", "stage": "distill", "state": "start"},
    {"event": "start", "stage": "distill", "epoch": 0, "epochs": 2, "step": 0, **START},
    {
        **{"event": "step", "stage": "distill", "epoch": 0, "epochs": 2, "step": 1, "steps": 18},
        **{"loss": 2.0, "images_per_s": 1234.5},
    },
    {"event": "epoch", "stage": "distill", "epoch": 0, "epochs": 2, "step": 9, "loss": 1.0},
    {"event": "stage", "stage": "distill", "state": "done", "seconds": 3.0, "text": "2 epochs"},
    {"event": "unheard of"},
    {
        **{"event": "end", "seconds": 4.0, "summary": SUMMARY},
        **{"report": "runs/x/report.html", "model": "runs/x/model"},
    },
]


class Clock:
    """Stands for the clock; every look at it is ten seconds later."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 10
        return self.now


def shown(*, terminal: bool, quiet: bool = False, events: Sequence[dict[str, Any]] = EVENTS) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, highlight=False)
    with Display(quiet=quiet, console=console) as shows:
        for event in events:
            shows(event)
    return stream.getvalue()


def test_a_log_gets_plain_lines_without_control_characters() -> None:
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert "profile   cpu: some processor" in text
    assert "dense     done earlier" in text
    line = "starts with validation top-1 91.20%, a peak learning rate of 2.0e-05"
    assert f"distill   {line}" in text
    assert "distill      3.0 s  2 epochs" in text


def test_a_log_says_where_the_training_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "time", Clock())
    lines = [line for line in shown(terminal=False).splitlines() if "step" in line]
    assert lines == [
        "distill   epoch 1/2  step 1/18  loss 2.0000  1,234 images/s",
        "distill   epoch 1/2  step 9/18  loss 1.0000  1,234 images/s  0:00:34 left",
    ]


def test_time_left_counts_from_where_a_resumed_training_began() -> None:
    pace = Pace()
    pace.update({"event": "step", "epoch": 4, "epochs": 10, "step": 500, "steps": 1000}, 100.0)
    assert "left" not in pace.text()
    pace.update({"event": "step", "epoch": 4, "epochs": 10, "step": 510, "steps": 1000}, 120.0)
    assert pace.text() == "epoch 5/10  step 510/1,000  0:16:20 left"


def test_a_training_after_another_starts_from_zero() -> None:
    pace = Pace()
    for step, now in ((1, 0.0), (5, 4.0)):
        event = {"event": "step", "stage": "gates", "step": step, "steps": 10, "loss": 1.0}
        live = {"alive": {"head": [3, 6]}, "attention": "gated"}
        pace.update({**event, "ce": 0.5, "soft": 2.0, **live}, now)
    assert pace.text() == (
        "epoch 1  step 5/10  loss 1.0000 (ce 0.5000 soft 2.0000)  heads 3/6, gated attention  "
        "0:00:05 left"
    )
    pace.update({"event": "step", "stage": "distill", "step": 1, "steps": 20, "loss": 3.0}, 9.0)
    assert pace.text() == "epoch 1  step 1/20  loss 3.0000"


def test_a_line_after_a_change_of_masks_says_what_is_live_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(display, "time", Clock())
    stream = io.StringIO()
    shows = Display(console=Console(file=stream, width=100))
    event = {"stage": "distill", "epoch": 0, "step": 1}
    whole = {"alive": {"head": (6, 6)}, "attention": "compact"}
    shows({**event, "event": "step", "steps": 2, "loss": 1.0, **whole})
    live = {"alive": {"head": (3, 6)}, "attention": "masked"}
    shows({**event, "event": "masks", "share": 0.5, **live})
    shows({**event, "event": "epoch", "step": 2, "loss": 0.5})
    _, change, last = stream.getvalue().splitlines()
    assert change == "distill   step 1: 50% of the MACs left, heads 3/6, masked attention"
    assert "step 2/2  loss 0.5000  heads 3/6, masked attention" in last


def test_time_left_is_of_the_training_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "time", Clock())
    stream = io.StringIO()
    shows = Display(console=Console(file=stream, width=100))
    gated = {"alive": {"head": (1, 2)}, "attention": "gated"}
    for stage, live in (("gates", gated), ("distill", {})):
        for step in (1, 2):
            event = {"event": "step", "stage": stage, "step": step, "steps": 4, "epoch": 0}
            shows({**event, **live})
    last = stream.getvalue().splitlines()[-1]
    # three looks at the clock between two steps
    assert "0:01:00 left" in last and "heads" not in last


def test_a_search_says_which_candidate_it_has_evaluated() -> None:
    pace = Pace()
    event = {"event": "search", "stage": "search", "step": 3, "steps": 57, "share": 0.712}
    pace.update({**event, "candidate": "round 1, head", "top1": 0.8}, 0.0)
    pace.update({**event, "step": 4, "candidate": "round 1, neuron", "top1": 0.79}, 2.0)
    assert pace.text() == (
        "4 of at most 57 candidates  round 1, neuron: 71% of the MACs, top-1 79.00%  0:01:46 left"
    )


def test_a_terminal_gets_a_bar() -> None:
    text = shown(terminal=True)
    assert "\x1b" in text and "3.0 s" in text
    # the bar of a stage is there before its first step
    assert "distill" in text and "step 9/18" in text


def test_the_last_column_of_costs_means_the_same_in_every_row() -> None:
    text = shown(terminal=False)
    rows = {line.split("│")[0].strip(): line for line in text.splitlines() if "│" in line}
    assert "4,000" in rows["MACs"] and "2,000" in rows["MACs"] and "50.0%" in rows["MACs"]
    assert "top-1" not in rows and "after, as a share of before" in text
    assert rows["latency, batch 1 (ms)"].endswith(" 50.0%")
    assert rows["images/s, batch 64"].endswith(" 200.0%")
    assert all(text in rows["peak memory, batch 1 (MB)"] for text in ("4.00", "3.00", "75.0%"))
    assert "-0.50" in rows["distilled"] and "99.00%" in rows["distilled"]


def test_the_last_line_says_what_each_step_did() -> None:
    text = shown(terminal=False)
    assert text.endswith(
        "report: runs/x/report.html\n"
        "top-1:  dense 98.00% -> cut 90.00% -> swept 97.00% -> distilled 97.50%\n"
    )
    rows = {line.split("│")[0].strip(): line for line in text.splitlines() if "│" in line}
    for words in ("97.00%", "582 of 600", "96.5% to 98.9%", "98.00%"):
        assert words in rows["swept"]
    assert [name for name in rows if name in ("dense", "cut", "swept", "distilled")] == [
        *("dense", "cut", "swept", "distilled")
    ]


def test_a_step_that_was_left_out_has_no_row() -> None:
    models = dict.fromkeys(("before", "cut", "after"), "model")
    end = {**EVENTS[-1], "summary": {**SUMMARY, "models": models}}
    text = shown(terminal=False, events=[end])
    assert text.endswith("dense 98.00% -> cut 90.00% -> distilled 97.50%\n")
    assert "swept" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_sweep_shows_the_places_done(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "time", Clock())
    places = [f"blocks.{k}.mlp" for k in range(3)]
    events: list[dict[str, Any]] = [{"event": "stage", "stage": "sweep", "state": "start"}]
    events += [
        {"event": "sweep", "stage": "sweep", "step": k + 1, "steps": 3, "place": place}
        for k, place in enumerate(places)
    ]
    text = shown(terminal=terminal, events=events)
    assert "2/3 places  blocks.1.mlp" in text and "left" in text


def test_quiet_prints_only_the_result() -> None:
    text = shown(terminal=False, quiet=True)
    assert "profile" not in text and "distill  " not in text and "MACs" in text


@pytest.mark.parametrize("quiet", [False, True])
def test_times_that_are_too_long_are_never_shown_without_saying_so(
    quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "too long" not in shown(terminal=False, quiet=quiet)
    monkeypatch.setitem(HALF, "latency_waited", 0.48)
    assert "the process waited for a core 48% of the time" in shown(terminal=False, quiet=quiet)
