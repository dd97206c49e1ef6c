"""`vitprune-fast report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from vitprune_fast.cli.options import parse


@dataclass(frozen=True)
class Report:
    """Write report.html of a run folder again, from what the run left there."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")] = tyro.MISSING
    """Run folder."""


def main(words: list[str]) -> int:
    """Writes the report and prints its path."""
    options = parse("report", words, lambda chosen: Report())
    if options is None:
        return 0
    from vitprune_fast.report import write_report

    print(write_report(options.folder))
    return 0
