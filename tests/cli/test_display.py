from __future__ import annotations

import io

from rich.console import Console

from vitprune_fast.cli.display import Display

HALF = {
    "params": 1000,
    "macs": 4000,
    "top1": 0.98,
    "top5": 1.0,
    "latency_ms": 2.0,
    "latency_p90_ms": 2.5,
    "latency_ms_batch64": 20.0,
    "images_per_s": 3200.0,
}
SUMMARY = {
    "before": HALF,
    "after": {
        **HALF,
        "macs": 2000,
        "top1": 0.975,
        "latency_ms": 1.0,
        "images_per_s": 6400.0,
        "agreement": 0.99,
    },
}
EVENTS = [
    {"event": "profile", "profile": "cpu: some processor"},
    {"event": "stage", "stage": "dense", "state": "kept"},
    {"event": "stage", "stage": "distill", "state": "start"},
    {"event": "step", "stage": "distill", "epoch": 0, "epochs": 2, "step": 1, "loss": 2.0},
    {"event": "epoch", "stage": "distill", "epoch": 0, "epochs": 2, "step": 9, "loss": 1.0},
    {"event": "stage", "stage": "distill", "state": "done", "seconds": 3.0, "text": "2 epochs"},
    {"event": "unheard of"},
    {"event": "end", "seconds": 4.0, "summary": SUMMARY, "report": "runs/x/report.html"},
]


def shown(*, terminal: bool, quiet: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, highlight=False)
    with Display(quiet=quiet, console=console) as display:
        for event in EVENTS:
            display(event)
    return stream.getvalue()


def test_a_log_gets_plain_lines_without_control_characters() -> None:
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert "profile   cpu: some processor" in text
    assert "dense     done earlier" in text
    assert "distill      3.0 s  2 epochs" in text


def test_a_terminal_gets_a_bar() -> None:
    text = shown(terminal=True)
    assert "\x1b" in text and "epochs" in text and "3.0 s" in text


def test_the_table_shows_before_after_and_change() -> None:
    text = shown(terminal=False)
    rows = {line.split("│")[0].strip(): line for line in text.splitlines() if "│" in line}
    assert "4,000" in rows["MACs"] and "2,000" in rows["MACs"] and "50.0%" in rows["MACs"]
    assert "-0.50 points" in rows["top-1"]
    assert "2.00x faster" in rows["latency, batch 1 (ms)"]
    assert "99.00%" in rows["agreement with dense"]
    assert "2.00x" in rows["images/s, batch 64"]
    assert text.endswith("report: runs/x/report.html\n")


def test_quiet_prints_only_the_result() -> None:
    text = shown(terminal=False, quiet=True)
    assert "profile" not in text and "distill" not in text and "MACs" in text
