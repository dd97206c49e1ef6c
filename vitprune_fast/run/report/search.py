"""The picture of a search: what its candidates cost, and how accurate they are."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from vitprune_fast.run.report import figures
from vitprune_fast.search import Candidate, SearchResult


def search_picture(result: SearchResult) -> bytes:
    """Accuracy against cost as a PNG file: a dot per candidate, filled where it is feasible."""
    dense = result.baseline

    def draw(axes: Axes) -> None:
        dots: Any = {"marker": "o", "markersize": 5, "linestyle": "none"}
        for candidate in result.table:
            filled: Any = {} if candidate.feasible else {"markerfacecolor": "none"}
            share = candidate.macs / dense.macs
            axes.plot(share, candidate.top1, **dots, color=_cut(candidate)[1], **filled)
        star: Any = {"marker": "*", "markersize": 15, "linestyle": "none", "label": "chosen"}
        axes.plot(
            result.macs / dense.macs,
            result.top1,
            **star,
            color=figures.LINES[4],
            markeredgecolor=figures.INK,
        )
        for name, colour in sorted({_cut(candidate) for candidate in result.table}):
            axes.plot([], [], **dots, color=colour, label=name)
        axes.axhline(dense.top1, color=figures.BEFORE, linewidth=1, linestyle="--", zorder=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("multiply-accumulates, share of the unpruned model's")
        axes.set_ylabel("top-1 on validation images")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axes.grid()
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="filled: feasible")

    return figures.picture(4.2, draw)


def _cut(candidate: Candidate) -> tuple[str, str]:
    """Which kinds a candidate cuts, and a colour for that."""
    kinds = [kind for kind, ratio in candidate.ratios.items() if ratio]
    if not kinds:
        return "nothing cut", figures.BEFORE
    colours: Any = figures.KINDS
    colour = colours[kinds[0]] if len(kinds) == 1 else figures.LINES[2]
    return " and ".join(kinds) + " cut", colour
