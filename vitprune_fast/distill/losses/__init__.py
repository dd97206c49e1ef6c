"""The losses that a student learns from its teachers: one file each, and its name is the loss's.

A file holds a subclass of ``_base.Loss`` called like it (``soft_deit.py``: ``SoftDeit``). Settings,
command line, curves and progress know a loss by the name of its file and by the first line of its
docstring. Nothing here imports torch, so that ``--help`` stays quick.
"""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

NAMES = tuple(sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_")))


def named(name: str) -> Any:
    """The class of a loss, see ``_base.Loss``; this imports torch."""
    return getattr(import_module(f"{__name__}.{name}"), name.title().replace("_", ""))


def described() -> str:
    """What the losses compare, each by its name, in one sentence."""
    lines = []
    for name in NAMES:
        loader: Any = getattr(find_spec(f"{__name__}.{name}"), "loader", None)
        source = loader.get_source(f"{__name__}.{name}") or ""
        docstring = ast.get_docstring(ast.parse(source)) or ""
        first = docstring.partition("\n")[0].rstrip(".")
        lines.append(f"`{name}` ({first[:1].lower()}{first[1:]})")
    return f"{', '.join(lines)}."
