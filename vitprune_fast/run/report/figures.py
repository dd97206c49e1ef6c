"""Pictures of a run as SVG text to put into a page: no script, no font file, nothing to fetch."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator

from vitprune_fast.structure import DEPTH_KINDS

BEFORE, AFTER, MUTED, INK = "#9aa5b1", "#1f6f8b", "#e4e7eb", "#323f4b"
LINES = ("#1f6f8b", "#c8553d", "#6b7f2a", "#8e5ea2", "#d69e2e", "#4a5568")
"""Colours of the runs in a comparison, in turn."""
_UNITS = ("head", "neuron", "qk_dim", "v_dim", "embed", "attn_branch", "mlp_branch", "block")
KINDS = dict(zip(_UNITS, cycle(LINES), strict=False))
"""Colours of the unit kinds that the candidates of a search cut."""
KEPT, GONE = AFTER, "#b3bcc6"
"""Colours of units, whatever their kind."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    **{f"axes.spines.{side}": False for side in ("left", "bottom", "top", "right")},
    **{f"{way}tick.{kind}.size": 0 for way in "xy" for kind in ("major", "minor")},
    "grid.color": MUTED,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}
# small panels side by side: on a phone they stack and stay readable
WIDTH = 4.4
EVERYWHERE = "all"
"""What stands for the block of an axis that is none of a block."""
MOST_POINTS = 300
"""Points of one colour in one block of a score picture; more would only blacken it."""


def drawn(title: str, height: float, draw: Callable[[Axes], None], width: float = WIDTH) -> str:
    """One panel as an `<svg>` element that scales with the page, the same text every time.

    Args:
        title: read out instead of the picture.
        height: in inches.
        draw: gets the axes of a styled figure.
        width: in inches.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\s(xmlns(:\w+)?)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r' (?:width|height)="[^"]*pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def picture(height: float, draw: Callable[[Axes], None]) -> bytes:
    """One panel as a PNG file, for a reader who has no page.

    Args:
        height: in inches.
        draw: gets the axes of a styled figure.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1.6 * WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def kept_units(axes_facts: Sequence[dict[str, Any]], title: str) -> str:
    """Per block the kept share of one unit kind: a cell per unit when few, a bar when many."""
    count, largest = len(axes_facts), max(axis["size"] for axis in axes_facts)

    def cells(axes: Axes) -> None:
        for row, axis in enumerate(axes_facts):
            alive = set(axis["units"])
            for unit in range(axis["size"]):
                colour = KEPT if unit in alive else GONE
                axes.barh(row, 0.86, left=unit - 0.43, height=0.8, color=colour, linewidth=0)
        axes.set_xlim(-0.6, largest - 0.4)
        axes.set_xlabel("block" if axes_facts[0]["kind"] in DEPTH_KINDS else "number")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    def bars(axes: Axes) -> None:
        rows = range(count)
        axes.barh(rows, [a["size"] for a in axes_facts], height=0.8, color=GONE)
        kept = [len(a["units"]) for a in axes_facts]
        axes.barh(rows, kept, height=0.8, color=KEPT)
        for row, value in zip(rows, kept, strict=True):
            inside = value > 0.2 * largest
            axes.text(
                value - 0.01 * largest if inside else value + 0.01 * largest,
                row,
                f"{value:,}",
                ha="right" if inside else "left",
                va="center",
                color="white" if inside else INK,
                fontsize=8,
            )
        axes.set_xlabel(f"kept, of {largest:,}")

    def draw(axes: Axes) -> None:
        (cells if largest <= 32 else bars)(axes)
        _a_row_per_block(axes, axes_facts)

    return drawn(title, 0.9 + 0.24 * count, draw)


def score_spread(axes_facts: Sequence[dict[str, Any]], title: str) -> str:
    """Per block the scores of one unit kind, in the colours of kept units and of those gone."""

    def draw(axes: Axes) -> None:
        size = 36 if max(axis["size"] for axis in axes_facts) <= 32 else 7
        positive = [s for axis in axes_facts for s in axis["scores"] if s > 0]
        for row, axis in enumerate(axes_facts):
            alive = set(axis["units"])
            for keeps in (False, True):
                chosen = _thinned(
                    [s for u, s in enumerate(axis["scores"]) if (u in alive) == keeps]
                )
                colour = KEPT if keeps else GONE
                # a fixed zigzag instead of random jitter: the same picture every time
                shift = [row + ((u * 7) % 11 - 5) / 16 for u in range(len(chosen))]
                label = ("kept" if keeps else "removed") if row == 0 else None
                axes.scatter(
                    chosen,
                    shift,
                    s=size,
                    color=colour,
                    alpha=0.65,
                    linewidth=0,
                    label=label,
                )
        if positive and max(positive) > 20 * min(positive):
            axes.set_xscale("symlog", linthresh=min(positive))
            axes.set_xlim(left=0.5 * min(positive))
            axes.xaxis.set_major_locator(LogLocator(numticks=6))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        _a_row_per_block(axes, axes_facts)
        axes.set_xlabel("score (larger matters more)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, markerscale=1.2)
        axes.grid(axis="x")

    return drawn(title, 1.2 + 0.24 * len(axes_facts), draw)


def _a_row_per_block(axes: Axes, axes_facts: Sequence[dict[str, Any]]) -> None:
    """Names the rows; one that is not of a block has no name."""
    blocks = [axis["block"] for axis in axes_facts]
    axes.set_ylim(len(blocks) - 0.4, -0.6)
    if blocks == [EVERYWHERE]:
        axes.set_yticks([])
        return
    axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_ylabel("block")


def _thinned(values: list[float]) -> list[float]:
    if len(values) <= MOST_POINTS:
        return values
    ordered = sorted(values)
    step = (len(ordered) - 1) / (MOST_POINTS - 1)
    return [ordered[round(k * step)] for k in range(MOST_POINTS)]


def curves(
    lines: Sequence[tuple[str, str, list[float], list[float]]],
    label: str,
    title: str,
    levels: Sequence[tuple[str, str, float]] = (),
) -> str:
    """Lines over epochs: (name, colour, epochs, values), and levels: (name, colour, value)."""

    def draw(axes: Axes) -> None:
        # equal curves lie on each other: a broken line shows the one below it
        for (name, colour, epochs, values), style in zip(lines, cycle(("-", "--", ":", "-."))):
            axes.plot(epochs, values, style, color=colour, linewidth=1.6, label=name)
        for name, colour, value in levels:
            axes.axhline(value, color=colour, linewidth=1, linestyle=(0, (6, 3)), label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if label.endswith("%"):
            _in_percent(axes.yaxis)
        axes.grid()
        if len(lines) + len(levels) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(lines), 3))

    return drawn(title, 2.7, draw)


def _in_percent(axis: Axis) -> None:
    """Ticks of shares that are at most 100 %, which is one of them where values come near."""
    low, high = axis.get_view_interval()
    if high > 99:
        axis.set_view_interval(low, 100, ignore=True)
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def intervals(rows: Sequence[tuple[str, float, float, float]], label: str, title: str) -> str:
    """A dot and its interval per row: (name, value, low, high)."""

    def draw(axes: Axes) -> None:
        for row, (_, value, low, high) in enumerate(rows):
            colour = AFTER if row else BEFORE
            axes.plot([low, high], [row, row], color=colour, linewidth=2.2, alpha=0.55)
            axes.plot([value], [row], "o", color=colour, markersize=6)
            axes.annotate(
                f"{value:.2f}", (value, row), (0, 6), textcoords="offset points", ha="center"
            )
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.6, -0.7)
        axes.set_xlabel(label)
        axes.margins(x=0.08)
        _in_percent(axes.xaxis)
        axes.grid(axis="x")

    return drawn(title, 0.8 + 0.45 * len(rows), draw)


def bars(rows: Sequence[tuple[str, float, float, str]], title: str) -> str:
    """Before and after, each row relative to before: (name, before, after, text of the change)."""

    def draw(axes: Axes) -> None:
        for row, (_, before, after, text) in enumerate(rows):
            axes.barh(
                row - 0.2, 1.0, height=0.34, color=BEFORE, label="before" if not row else None
            )
            share = after / before if before else 0.0
            axes.barh(
                row + 0.2, share, height=0.34, color=AFTER, label="after" if not row else None
            )
            axes.text(share + 0.015, row + 0.2, text, va="center", fontsize=8.5)
        longest = max([1.0, *(after / before for _, before, after, _ in rows if before)])
        axes.set_xlim(0, longest * 1.28)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        # one of them is at 100 %
        axes.xaxis.set_major_locator(MultipleLocator(0.25 * math.ceil(longest)))
        axes.grid(axis="x")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)

    return drawn(title, 0.9 + 0.52 * len(rows), draw)
