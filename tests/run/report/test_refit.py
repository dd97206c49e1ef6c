"""What the report says of the sweep."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.run.report.test_report import Page
from vitprune_fast import files
from vitprune_fast.run.report import write_report
from vitprune_fast.run.report.refit import MOST_FITS


def fit(place: str, part: str = "writer", **other: Any) -> dict[str, Any]:
    errors = {"before": 0.5, "after": 0.25, "held_out": 0.125, "ridge": 1e-3, "left_out": ""}
    return {"place": place, "part": part, **errors, **other}


@pytest.fixture
def reported(folder: Path, tmp_path: Path) -> Any:
    """Writes the report of a run whose sweep did this; its text, and its words alone."""
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)

    def report(fits: list[dict[str, Any]], warnings: tuple[str, ...] = ()) -> tuple[str, str]:
        facts = {"images": 1024, "held_out": 103, "tokens": 5120, "warnings": [*warnings]}
        files.write_json(copy / "sweep.json", {**facts, "fits": fits})
        text = write_report(copy).read_text(encoding="utf-8")
        page = Page(text)
        assert page.open == []
        return text, " ".join(" ".join(page.words).split())

    return report


def test_every_fit_has_a_row_with_its_errors(reported: Any) -> None:
    why = "a norm <b>forbids</b> it"
    text, words = reported(
        [
            fit("blocks.0.attn"),
            fit("blocks.0.mlp", "reader", before=0.3, ridge=None),
            fit("blocks.0.mlp", left_out=why, before=0.75, after=0.75, held_out=0.875),
            fit("head", "classifier", ridge="infinite"),
        ],
        ("few tokens",),
    )
    assert "3 of 4 fits were applied" in words
    assert "made on 921 training images (5,120 tokens) and judged on 103 that are held out" in words
    assert "blocks.0.attn what it puts out 50.0% 25.0% 12.5% 1e-03" in words
    # a branch is named once
    assert "blocks.0.mlp what it reads 30.0% 25.0% 12.5% what it puts out 75.0%" in words
    assert f"75.0% 87.5% 1e-03 {why}" in words
    assert "head logits 50.0% 25.0% 12.5% bias alone" in words and "few tokens" in words
    assert "<b>forbids" not in text
    assert "<details" in text and "open><summary>All 4 fits" in text


def test_many_fits_are_shown_when_asked_for(reported: Any) -> None:
    text, _ = reported([fit(f"blocks.{k}.mlp") for k in range(MOST_FITS + 1)])
    assert f'"><summary>All {MOST_FITS + 1} fits' in text


def test_a_plan_that_cuts_nothing_has_nothing_to_refit(reported: Any) -> None:
    text, words = reported([])
    assert "there was nothing to refit" in words and "<summary>All" not in text
