"""What pyproject.toml declares that the package needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
_tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PYPROJECT: dict[str, Any] = _tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
BUILD: list[str] = PYPROJECT["build-system"]["requires"]
# extras of users, not of developers
EXTRAS: dict[str, list[str]] = {
    name: listed
    for name, listed in PROJECT["optional-dependencies"].items()
    if name not in ("test", "lint")
}
TEST: list[str] = PROJECT["optional-dependencies"]["test"]


def oldest(requirements: Iterable[str]) -> list[str]:
    """Each package once, sorted, at the version that is the least allowed: ``>=X`` is ``==X``."""
    pinned: dict[str, str] = {}
    for each in map(Requirement, requirements):
        each.specifier = SpecifierSet(str(each.specifier).replace(">=", "=="))
        # one that is listed twice may have its bound in one of the places
        if each.specifier or each.name not in pinned:
            pinned[each.name] = str(each)
    return sorted(pinned.values())


def oldest_python() -> str:
    """Such as ``3.10``."""
    return PROJECT["requires-python"].removeprefix(">=")
