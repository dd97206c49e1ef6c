"""What a folder of the package holds, one file each, found by the names of its files.

Nothing here imports torch: flags list names before anything is loaded.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def names(folder: str) -> list[str]:
    """The names in a folder such as ``scoring/criteria``: of ``left_out.py`` it is ``left-out``.

    Files that begin with an underscore are none, and an underscore at the end keeps a file from
    being called as a word of Python is.
    """
    files = sorted(path.stem for path in (HERE / folder).glob("*.py"))
    return [_shown(stem) for stem in files if not stem.startswith("_")]


def named(folder: str, name: str, what: str) -> Any:
    """The value ``what`` of the file of that name.

    Raises:
        KeyError: there is no such file.
    """
    stems = {_shown(path.stem): path.stem for path in (HERE / folder).glob("[!_]*.py")}
    if not isinstance(name, str):
        raise KeyError(repr(name))
    module = ".".join((__package__ or "", *folder.split("/"), stems[name]))
    return getattr(import_module(module), what)


def _shown(stem: str) -> str:
    return stem.rstrip("_").replace("_", "-")
