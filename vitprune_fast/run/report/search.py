"""The picture of a search: what its candidates cost, and how accurate they are; and their table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from vitprune_fast import files
from vitprune_fast.run.folder import RunFolder
from vitprune_fast.run.report import figures
from vitprune_fast.search.result import table_of

MOST_CANDIDATES = 20
"""Rows of the table of candidates that are shown unasked."""


def search_facts(run: RunFolder, name: str) -> dict[str, Any]:
    """What the page says of a search: its table, and its picture as SVG."""
    found = files.read_json(files.inside(run.path, name))
    headings, *rows = table_of(found)
    return {
        "headings": headings,
        "rows": rows,
        "is_long": len(rows) > MOST_CANDIDATES,
        "picture": figures.drawn("candidates of the search", 4.2, _candidates(found)),
    }


def search_picture(found: dict[str, Any]) -> bytes:
    """A PNG file of a search, given as ``SearchResult.to_json`` has it."""
    return figures.picture(4.2, _candidates(found))


def _candidates(found: dict[str, Any]) -> Callable[[Axes], None]:
    """Accuracy against cost: a dot per candidate, filled where it is feasible."""
    dense, chosen = found["baseline"], found["chosen"]

    def draw(axes: Axes) -> None:
        dots: Any = {"marker": "o", "markersize": 5, "linestyle": "none"}
        for candidate in found["table"]:
            filled: Any = {} if candidate["feasible"] else {"markerfacecolor": "none"}
            share = candidate["macs"] / dense["macs"]
            axes.plot(share, candidate["top1"], **dots, color=_cut(candidate)[1], **filled)
        star: Any = {"marker": "*", "markersize": 15, "linestyle": "none", "label": "chosen"}
        axes.plot(
            chosen["macs"] / dense["macs"],
            chosen["top1"],
            **star,
            color=figures.LINES[4],
            markeredgecolor=figures.INK,
        )
        for name, colour in sorted({_cut(candidate) for candidate in found["table"]}):
            axes.plot([], [], **dots, color=colour, label=name)
        axes.axhline(dense["top1"], color=figures.BEFORE, linewidth=1, linestyle="--", zorder=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("multiply-accumulates, share of the unpruned model's")
        axes.set_ylabel("top-1 on validation images")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axes.grid()
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, title="filled: feasible")

    return draw


def _cut(candidate: dict[str, Any]) -> tuple[str, str]:
    """Which kinds a candidate cuts, and a colour for that."""
    kinds = [kind for kind, ratio in candidate["ratios"].items() if ratio]
    if not kinds:
        return "nothing cut", figures.BEFORE
    colours: Any = figures.KINDS
    colour = colours[kinds[0]] if len(kinds) == 1 else figures.LINES[2]
    return " and ".join(kinds) + " cut", colour
