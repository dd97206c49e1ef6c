"""What the report says of the sweep: every fit with its errors."""

from __future__ import annotations

from typing import Any

from vitprune_fast import files
from vitprune_fast.run.folder import RunFolder

PART_NAMES = {"reader": "what it reads", "writer": "what it puts out", "classifier": "logits"}
MOST_FITS = 20
"""Rows of the table of fits that are shown unasked."""


def refit_facts(run: RunFolder, name: str) -> dict[str, Any]:
    """What the page says of a refit: counts, and a row per fit."""
    report = files.read_json(files.inside(run.path, name))
    fits, shown = [], ""
    for fit in report["fits"]:
        place, shown = ("" if fit["place"] == shown else fit["place"]), fit["place"]
        errors = [f"{fit[name]:.1%}" for name in ("before", "after", "held_out")]
        fits.append(
            (place, PART_NAMES[fit["part"]], *errors, ridge_text(fit["ridge"]), fit["left_out"])
        )
    return {
        **report,
        "rows": fits,
        "applied": sum(not fit["left_out"] for fit in report["fits"]),
        "is_long": len(fits) > MOST_FITS,
    }


def ridge_text(value: float | str | None) -> str:
    """The ridge of a fit in words; empty where there was none."""
    if value is None:
        return ""
    return "bias alone" if isinstance(value, str) else f"{value:.0e}"
