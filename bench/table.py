"""Turn bench/results/*.json into the tables of bench/results/README.md."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
INTRODUCTION = """# Measured results

Written by `make bench` and `make gpu` from the JSON files beside it; not edited by hand. Each line
is the minimum over interleaved rounds, after the outputs were checked to be equal. CPU numbers are
the processor time of one thread. "times ours" above 1 means that our form is the faster one;
"spread" is how far the median lies above the minimum.
"""
COLUMNS = (
    "| op | case | form | min us | GB/s | times ours | spread |\n|---|---|---|--:|--:|--:|--:|"
)


def load_note(content: dict) -> str:
    """A warning where other work ran beside the measurement."""
    load = content.get("load_average", 0)
    return f", load average {load}: other work shared the caches" if load > 1.5 else ""


def table(content: dict) -> str:
    """The table of one results file."""
    versions = content["versions"]
    title = f"## {content['device']}\n"
    facts = (
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {versions['torch']}, Triton {versions['triton']}"
        f"{load_note(content)}.\n"
    )
    rows = [
        f"| {r['op']} | {r['case']} | {r['form']} | {r['min_us']} | {r['gb_per_s']} "
        f"| {r['times_ours']} | {100 * r['spread']:.0f} % |"
        for r in content["records"]
    ]
    return "\n".join([title, facts, COLUMNS, *rows, ""])


def page() -> str:
    """The README of the results: a table for every file that holds timings of ops, newest first."""
    contents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))[::-1]]
    tables = [table(content) for content in contents if "records" in content]
    return "\n".join([INTRODUCTION, *tables])


if __name__ == "__main__":
    (RESULTS / "README.md").write_text(page())
