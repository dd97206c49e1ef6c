"""What a folder of the package holds, one file each, found by the names of its files.

Nothing here imports torch: flags list names and their help before anything is loaded.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def names(folder: str) -> list[str]:
    """The names in a folder such as ``scoring/criteria``, sorted.

    A file that begins with an underscore is none. An underscore at the end keeps a file from being
    called as a word of Python is, and is no part of the name.
    """
    return sorted(_files(folder))


def named(folder: str, name: str, what: str) -> Any:
    """The value ``what`` of the file of that name.

    Raises:
        KeyError: there is no such file.
    """
    if not isinstance(name, str):
        raise KeyError(repr(name))
    path = _files(folder)[name]
    return getattr(
        import_module(".".join((__package__ or "", *folder.split("/"), path.stem))), what
    )


def described(folder: str) -> str:
    """Each name with the first line of its file, in one sentence."""
    lines = []
    for name, path in sorted(_files(folder).items()):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = docstring.partition("\n")[0].rstrip(".")
        lines.append(f"`{name}` ({first[:1].lower()}{first[1:]})")
    return f"{', '.join(lines)}."


def _files(folder: str) -> dict[str, Path]:
    return {path.stem.rstrip("_"): path for path in (HERE / folder).glob("[!_]*.py")}
