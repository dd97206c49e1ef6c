"""Lines of JSON, one finding each, that a cut run leaves whole."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from vitprune_fast.benches.results import LISTS

MISSING = "not installed"
# how a step may end without a fault
GOOD = ("passed", "nothing to run", MISSING)


def append(path: Path, kind: str, finding: dict[str, Any]) -> None:
    """Add one line; behind one that was cut, on a line of its own."""
    text = json.dumps({"kind": kind, **finding}) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b"\n" else "\n" + text
        file.write(text.encode())


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; none of a file that is not there."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            # what wrote it was killed, or the disk was full
            continue
    return found


def as_file_name(device: str) -> str:
    """The name of a device, the first of its facts, as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.partition(",")[0].lower()).strip("-")


def replace(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole, or leave the one that is there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def combined(*folders: Path) -> dict[str, Any]:
    """What the runs of `make gpu` that left these folders found, as one results file.

    Args:
        folders: the earliest first. Where a step, a case of an op or a race was run again, the
            later one counts.

    Returns:
        The facts, ``cases`` (name of a step -> status and seconds), ``failed`` (tests, with their
        faults) and the lists of :data:`LISTS`.
    """
    unknown = {"torch": "unknown", "triton": "unknown"}
    content: dict[str, Any] = {"command": "make gpu", "commit": "unknown", "versions": unknown}
    steps: dict[str, dict] = {}
    tests: dict[str, dict] = {}
    found: dict[str, dict[tuple, dict]] = {name: {} for name in LISTS.values()}
    for folder in folders:
        facts = folder / "facts.json"
        if facts.is_file():
            content |= json.loads(facts.read_text())
            # what ended before torch was asked has what the driver says
            content.setdefault("device", content.get("gpu", "").partition(",")[0].strip())
        for line in read(folder / "found.jsonl"):
            kind = line.pop("kind")
            if kind == "step":
                steps[line.pop("name")] = line
            elif kind == "test":
                tests[line["test"]] = line
            else:
                key = tuple(line.get(name) for name in ("op", "case", "form"))
                earlier = found[LISTS[kind]].get(key, {})
                if "entries" in line:
                    # forms that were raced apart from the others
                    forms = {each["name"]: each for each in earlier.get("entries", [])}
                    forms |= {each["name"]: each for each in line["entries"]}
                    line["entries"] = list(forms.values())
                found[LISTS[kind]][key] = line
    failed = [test for test in tests.values() if test["failed"]]
    passed = len(tests) - len(failed)
    lists = {name: list(rows.values()) for name, rows in found.items()}
    return {**content, "cases": steps, "tests_passed": passed, "failed": failed, **lists}
