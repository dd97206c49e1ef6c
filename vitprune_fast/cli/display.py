"""What a run shows: bars on a terminal, plain lines anywhere else, and the table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from vitprune_fast.config.distill import LOSSES
from vitprune_fast.data import ImageData
from vitprune_fast.planning.waiting import load_warning
from vitprune_fast.registry import names
from vitprune_fast.run.assumptions import line
from vitprune_fast.run.comparison import COSTS, STEPS, arrow, costs, steps

_PARTS = ("ce", "bce", *names(LOSSES))
LINE_EVERY_S = 10.0
"""Seconds between two lines of one step where there is no terminal."""


class Display:
    """Receives the events of a run; use it as a context and pass it as `on_event`."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.quiet = quiet
        self._bars = Progress(
            TextColumn("  {task.description:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
        )
        self._bar: TaskID | None = None
        self._last_line = -math.inf
        self._pace = Pace()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._drop_bar()

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in _LINES:
            self._say(*_LINES[kind](event))
        elif kind in ("step", "epoch", "sweep", "search"):
            self._on_step(event)
        elif kind in ("stage", "masks", "end"):
            getattr(self, f"_on_{kind}")(event)

    def _say(self, topic: str, text: str) -> None:
        if not self.quiet:
            self.console.print(f"{topic:<9} {text}".rstrip(), markup=False)

    def _on_stage(self, event: dict[str, Any]) -> None:
        name, state, text = event["stage"], event["state"], event.get("text", "")
        self._drop_bar()
        if state == "start":
            self._last_line = time.monotonic()
            self._pace = Pace()
            self._show_bar(name)
        else:
            how = "done earlier" if state == "kept" else f"{event['seconds']:6.1f} s"
            self._say(name, f"{how}  {text}")

    def _on_step(self, event: dict[str, Any]) -> None:
        self._pace.update(event, time.monotonic())
        if self.quiet:
            return
        if self._bar is not None:
            self._bars.update(
                self._bar,
                completed=event["step"],
                total=self._pace.steps,
                text=self._pace.text(),
                # steps come faster than anyone reads, the others may be minutes apart
                refresh=event["event"] != "step",
            )
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._say(event.get("stage", ""), self._pace.text())

    def _on_masks(self, event: dict[str, Any]) -> None:
        self._pace.update(event, time.monotonic())
        share = f"{event['share']:.0%} of the MACs left"
        self._say(event["stage"], f"step {event['step']:,}: {share}, {alive_text(event)}")

    def _show_bar(self, name: str) -> None:
        if self.console.is_terminal and not self.quiet:
            # without a total the bar pulses, until the first step tells it
            self._bar = self._bars.add_task(name, total=None, text="")
            self._bars.start()

    def _drop_bar(self) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bars.stop()
            self._bar = None

    def _on_end(self, event: dict[str, Any]) -> None:
        summary = event["summary"]
        self.console.print()
        print_table(COSTS, costs(summary["before"], summary["after"]), self.console)
        self.console.print()
        print_table(STEPS, steps(summary), self.console)
        warning = load_warning(summary["before"]["latency_waited"])
        if warning:
            self.console.print(f"\n{line('latency', warning)}", markup=False)
        self.console.print(f"\nmodel:  {event['model']}", markup=False)
        self.console.print(f"report: {event['report']}", markup=False)
        self.console.print(f"top-1:  {arrow(summary)}", markup=False)


_LINES: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "profile": lambda event: ("profile", event["profile"]),
    "assumption": lambda event: (event["topic"], " ".join(event["text"].split())),
    "note": lambda event: ("note", event["text"]),
    "resume": lambda event: (event["stage"], f"resumes at step {event['step']:,}"),
    "start": lambda event: (event["stage"], f"starts with {start_text(event)}"),
    "damaged_checkpoint": lambda event: (
        event["stage"],
        f"skips a damaged checkpoint: {event.get('reason', '')}",
    ),
    "skipped_step": lambda event: (
        event["stage"],
        f"step {event['step']:,} is skipped: not finite",
    ),
}
"""Event -> the topic and the text of the one line that it is worth."""


def print_assumptions(assumptions: Mapping[str, str]) -> None:
    """A line for each thing a verb takes for granted."""
    for topic, text in assumptions.items():
        print(line(topic, text))


def print_set_aside(data: ImageData) -> None:
    """A line about the images that could not be read, where there are some."""
    if data.set_aside:
        print(line("left out", f"unreadable images, {data.set_aside}"))


class Pace:
    """Progress of a training, scoring, sweep or search: where it is, its speed, the time left."""

    def __init__(self) -> None:
        self.steps: int | None = None
        self._event: dict[str, Any] = {}
        self._first: tuple[int, float] | None = None
        self._left_s: float | None = None

    def update(self, event: dict[str, Any], now: float) -> None:
        """Takes in a `step`, `epoch`, `masks`, `sweep` or `search` event.

        What it does not say stays as it was; another step of the run starts over.
        """
        if event.get("stage") != self._event.get("stage", event.get("stage")):
            self.steps, self._event, self._first, self._left_s = None, {}, None, None
        self.steps = event.get("steps", self.steps)
        self._event = {**self._event, "val_top1": None, **event}
        done = event["step"]
        if self._first is None:
            self._first = done, now
        elif self.steps and done > self._first[0]:
            per_step = (now - self._first[1]) / (done - self._first[0])
            self._left_s = per_step * (self.steps - done)

    def text(self) -> str:
        """One line: epoch, step, loss, validation, images per second, time left."""
        event = self._event
        if event.get("stage") == "score":
            words = [f"{event['step']:,}" + (f"/{self.steps:,}" if self.steps else "") + " images"]
            return "  ".join([*words, *self._rates()])
        if event.get("event") == "sweep":
            words = [f"{event['step']:,}/{event['steps']:,} places", str(event["place"])]
            return "  ".join([*words, *self._rates()])
        if event.get("event") == "search":
            words = [f"{event['step']:,} of at most {self.steps:,} candidates"]
            found = f"{event['share']:.0%} of the MACs, top-1 {event['top1']:.2%}"
            return "  ".join([*words, f"{event['candidate']}: {found}", *self._rates()])
        # the loop counts epochs from 0
        epoch = int(event.get("epoch", 0)) + 1
        words = [f"epoch {epoch}/{event['epochs']}" if event.get("epochs") else f"epoch {epoch}"]
        words.append(f"step {event['step']:,}" + (f"/{self.steps:,}" if self.steps else ""))
        if event.get("loss") is not None:
            parts = " ".join(
                f"{name} {event[name]:.4f}"
                for name in event
                if name in _PARTS or name.rpartition(":")[2] in _PARTS
                if event[name] is not None
            )
            words.append(f"loss {event['loss']:.4f}" + (f" ({parts})" if parts else ""))
        if event.get("alive"):
            words.append(alive_text(event))
        if event.get("val_top1") is not None:
            words.append(f"validation top-1 {event['val_top1']:.2%}")
        return "  ".join([*words, *self._rates()])

    def _rates(self) -> list[str]:
        words = []
        if self._event.get("images_per_s"):
            words.append(rate_text(self._event["images_per_s"]))
        if self._event.get("mfu"):
            words.append(f"MFU {self._event['mfu']:.0%}")
        elif self._event.get("gflops_per_s"):
            words.append(f"{self._event['gflops_per_s']:,.0f} GFLOP/s")
        if self._left_s is not None:
            minutes, seconds = divmod(round(self._left_s), 60)
            hours, minutes = divmod(minutes, 60)
            words.append(f"{hours}:{minutes:02}:{seconds:02} left")
        return words


def alive_text(event: dict[str, Any]) -> str:
    """Live units of each kind, and how the live heads attend: `heads 9/12, masked attention`."""
    alive = [f"{kind}s {on:,}/{total:,}" for kind, (on, total) in event["alive"].items()]
    return ", ".join([*alive, f"{event['attention']} attention"])


def start_text(event: dict[str, Any]) -> str:
    """What a training found before its first step: `validation top-1 91.20%`."""
    words = []
    if "val_top1" in event:
        words.append(f"validation top-1 {event['val_top1']:.2%}")
    if "peak_lr" in event:
        words.append(f"a peak learning rate of {event['peak_lr']:.1e}")
    return ", ".join(words)


def rate_text(images_per_s: float) -> str:
    """Images per second, with two digits where there are few."""
    return f"{images_per_s:,.0f} images/s" if images_per_s >= 10 else f"{images_per_s:.2g} images/s"


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """A table of text: the first column to the left, wrapped where it must, others to the right."""
    table = Table(show_edge=False, pad_edge=False)
    for position, heading in enumerate(headings):
        # a number that is cut off is worse than a long line
        width = max(len(text) for text in (heading, *(row[position] for row in rows)))
        table.add_column(
            heading,
            justify="left" if position == 0 else "right",
            no_wrap=position > 0,
            overflow="fold",
            min_width=width if position else None,
        )
    for row in rows:
        table.add_row(*row)
    (console or Console(highlight=False)).print(table)
