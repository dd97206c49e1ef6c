"""What a run shows: bars on a terminal, plain lines anywhere else, and the table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from vitprune_fast.recipes.comparison import comparison

LINE_EVERY_S = 10.0
"""Seconds between two lines of one stage where there is no terminal."""


class Display:
    """Receives the events of a run; use it as a context and pass it as `on_event`."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.quiet = quiet
        self._bars = Progress(
            TextColumn("  {task.description:<9}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f} epochs"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
        )
        self._bar: TaskID | None = None
        self._last_line = -math.inf

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._drop_bar()

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event.get('event')}", None)
        if handler is not None:
            handler(event)

    def _say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def _on_profile(self, event: dict[str, Any]) -> None:
        self._say(f"profile   {event['profile']}")

    def _on_note(self, event: dict[str, Any]) -> None:
        self._say(f"note      {event['text']}")

    def _on_stage(self, event: dict[str, Any]) -> None:
        name, state = event["stage"], event["state"]
        if state == "start":
            self._last_line = time.monotonic()
        elif state == "kept":
            self._say(f"{name:<9} done earlier  {event.get('text', '')}".rstrip())
        else:
            self._drop_bar()
            self._say(f"{name:<9} {event['seconds']:6.1f} s  {event.get('text', '')}".rstrip())

    def _on_resume(self, event: dict[str, Any]) -> None:
        self._say(f"{event['stage']:<9} resumes at step {event['step']:,}")

    def _on_damaged_checkpoint(self, event: dict[str, Any]) -> None:
        self._say(
            f"{event['stage']:<9} a damaged checkpoint is left out: {event.get('reason', '')}"
        )

    def _on_skipped_step(self, event: dict[str, Any]) -> None:
        self._say(f"{event['stage']:<9} step {event['step']:,} is skipped: not finite")

    def _on_step(self, event: dict[str, Any]) -> None:
        if self.quiet:
            return
        if self.console.is_terminal:
            self._move_bar(event)
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._line(event)

    def _on_epoch(self, event: dict[str, Any]) -> None:
        self._on_step(event)

    def _line(self, event: dict[str, Any]) -> None:
        self._last_line = time.monotonic()
        done, total = _epochs(event)
        self._say(f"{event.get('stage', ''):<9} epoch {done}/{total}  {_state(event)}")

    def _move_bar(self, event: dict[str, Any]) -> None:
        done, total = _epochs(event)
        if self._bar is None:
            self._bar = self._bars.add_task(event.get("stage", ""), total=total, text="")
            self._bars.start()
        self._bars.update(self._bar, completed=done, total=total, text=_state(event))

    def _drop_bar(self) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bars.stop()
            self._bar = None

    def _on_end(self, event: dict[str, Any]) -> None:
        summary = event["summary"]
        table = Table(show_edge=False, pad_edge=False)
        for heading in ("", "before", "after", "change"):
            table.add_column(heading, justify="left" if heading == "" else "right")
        for row in comparison(summary["before"], summary["after"]):
            table.add_row(*row)
        self.console.print()
        self.console.print(table)
        self.console.print(f"\nreport: {event['report']}", markup=False)


def _epochs(event: dict[str, Any]) -> tuple[int, int]:
    """(epochs done, epochs of the training); the loop counts epochs from 0."""
    done = int(event.get("epoch", 0)) + (event.get("event") == "epoch")
    return done, int(event.get("epochs", 0)) or 1


def _state(event: dict[str, Any]) -> str:
    words = []
    if event.get("loss") is not None:
        words.append(f"loss {event['loss']:.4f}")
    if event.get("val_top1") is not None:
        words.append(f"validation top-1 {event['val_top1']:.2%}")
    if event.get("images_per_s"):
        words.append(f"{event['images_per_s']:,.0f} images/s")
    return "  ".join(words)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of text: the first column to the left, the others to the right."""
    table = Table(show_edge=False, pad_edge=False)
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
