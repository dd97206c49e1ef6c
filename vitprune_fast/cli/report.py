"""`vitprune-fast report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from vitprune_fast.cli.options import parse
from vitprune_fast.cli.usage import UsageError
from vitprune_fast.config.run import Threads
from vitprune_fast.errors import InvalidInput

COMPARISON = Path("comparison.html")


@dataclass(frozen=True)
class Report:
    """Write report.html of a run folder again; with several folders, compare the runs."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR ...")] = tyro.MISSING
    """Run folders; the first of several is what the others differ from."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """Where the comparison of several runs is written; unset: comparison.html."""
    threads: Threads = None


def main(words: list[str]) -> None:
    """Writes the report or the comparison and prints its path."""
    options = parse("report", words, lambda chosen: Report(), outputs=_outputs)
    if not options.folders:
        raise UsageError("report: DIR must be given, a run folder or several, got none")
    from vitprune_fast.run.profile import applied, choose_profile
    from vitprune_fast.run.report import write_comparison, write_report

    with applied(choose_profile("cpu", options.threads)):
        if len(options.folders) == 1:
            print(write_report(options.folders[0]))
        else:
            print(write_comparison(options.folders, options.out or COMPARISON))


def _outputs(options: Report) -> dict[str, Path | None]:
    """One run gets its report among its own files; a comparison goes elsewhere."""
    if len(options.folders) > 1:
        return {"out": options.out or COMPARISON}
    if options.out is not None:
        raise InvalidInput(
            "report: out must be unset for one run, whose report goes into its folder, got "
            f"{options.out}"
        )
    return {}
