"""The picture of a search shows every candidate, and marks the feasible ones and the chosen one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from vitprune_fast.run.report import figures
from vitprune_fast.run.report.search import search_picture
from vitprune_fast.search import Candidate, SearchResult


def candidate(head: float, neuron: float, top1: float, feasible: bool = True) -> Candidate:
    ratios, macs = {"head": head, "neuron": neuron}, round(1000 * (1 - head / 3 - neuron / 2))
    plan: Any = None
    return Candidate("grid", ratios, {}, macs, 0, top1, None, 100, feasible, "", plan)


DENSE, CHOSEN = candidate(0, 0, 0.9), candidate(0.3, 0.4, 0.88)
TABLE = (
    *(DENSE, candidate(0.3, 0, 0.89), candidate(0, 0.4, 0.9), CHOSEN),
    candidate(0.6, 0.8, 0.5, feasible=False),
)
RESULT = SearchResult("grid", CHOSEN, DENSE, TABLE)


def test_every_candidate_is_a_dot_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = Figure().add_subplot()
    monkeypatch.setattr(figures, "picture", lambda height, draw: draw(axes))
    search_picture(RESULT.to_json())
    drawn = [line for line in axes.get_lines() if np.size(line.get_xdata()) == 1]
    *dots, star = [tuple(np.ravel(line.get_xydata())) for line in drawn]
    assert dots == [(each.macs / 1000, each.top1) for each in TABLE]
    assert star == (CHOSEN.macs / 1000, CHOSEN.top1) and drawn[-1].get_marker() == "*"
    hollow = [line.get_markerfacecolor() == "none" for line in drawn[:-1]]
    assert hollow == [not each.feasible for each in TABLE]
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == [
        *("chosen", "head and neuron cut", "head cut", "neuron cut", "nothing cut"),
    ]
    # what is cut alike has the colour of its line in the legend
    assert drawn[3].get_color() == drawn[4].get_color()
    assert len({line.get_color() for line in drawn}) == 5


def test_it_is_a_png_file() -> None:
    assert search_picture(RESULT.to_json()).startswith(b"\x89PNG\r\n\x1a\n")
