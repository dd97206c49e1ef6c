"""What a file of bench/results holds: findings by kind, and what they were found with."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprune_fast.timing import Entry

LISTS = {
    "record": "records",
    "scoring": "scoring",
    "training": "training",
    "memory": "memory",
    "stages": "stages",
}
"""The names of the lists in a file, by the kind of a finding."""


def facts(device: str, commit: str) -> dict[str, Any]:
    """What a results file says of the machine and the code.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        commit: of the code, or what tells it otherwise.
    """
    from vitprune_fast._version import __version__
    from vitprune_fast.doctor import doctor

    report = doctor()
    return {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "commit": commit,
        "device": report.devices["cuda:0" if device == "cuda" else "cpu"],
        "instructions": report.native.get("built with cpu_instructions", "unknown"),
        "versions": {**report.versions, "vitprune_fast": __version__},
        "system": platform.system(),
        # above the number of cores the caches were shared with others
        "load_average": round(os.getloadavg()[0], 1),
    }


def step_race(case: str, device: str, found: Sequence[Entry]) -> dict[str, Any]:
    """A race of whole scoring or training steps, as a finding."""
    forms = [{name: v for name, v in asdict(each).items() if name != "taken"} for each in found]
    return {"case": case, "device": device, "entries": forms}


class Results:
    """A results file that grows: what was found before an interruption is there.

    Args:
        path: of the file; None keeps nothing.
        command: that found it, as the file names it.
    """

    def __init__(self, path: Path | None, command: str):
        self._path, self._command = path, command
        self._lists: dict[str, list[dict[str, Any]]] = {name: [] for name in LISTS.values()}

    def add(self, kind: str, finding: dict[str, Any]) -> None:
        """Keep one finding of a kind of :data:`LISTS`, which names its ``device``."""
        from vitprune_fast import files

        self._lists[LISTS[kind]].append(finding)
        if self._path is not None:
            found = facts(finding["device"], "as installed")
            files.write_json(self._path, {"command": self._command, **found, **self._lists})
