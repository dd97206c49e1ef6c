"""Prune Vision Transformers: describe, score, plan, prune, distill.

Each step is a function of plain values and returns a plain value that can be saved and loaded::

    describe ──▶ score ──▶ plan ──▶ prune ──▶ distill ──▶ save / report
    Structure    Scores    Plan     model     model
"""

from __future__ import annotations

import ast
import pkgutil
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from ._version import __version__ as __version__
from ._when_imported import when_imported

_STUB = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or "")
# public name -> the module it lives in; "" where it is a module itself
_HOMES = {
    alias.name: node.module or ""
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


class _Package(ModuleType):
    """Imports public names at first use, so that ``import vitprune_fast`` and ``--help`` are quick.

    Some functions share their name with a module (``distill``, ``doctor``, ``run``, ``search``).
    The import system writes an imported module into its package; here the function keeps the name.
    """

    __all__ = tuple(sorted(_HOMES.keys() - {"__version__"}))

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if not _HOMES[name]:
            return import_module(f"{__name__}.{name}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and _HOMES.get(name)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        own = (name for name in super().__dir__() if name.startswith("__"))
        return sorted({*own, *self.__all__})


sys.modules[__name__].__class__ = _Package
# timm then opens every folder that we saved
when_imported("timm", lambda: import_module(f"{__name__}.models.entrypoints"))
