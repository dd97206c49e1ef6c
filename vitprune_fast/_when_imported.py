"""Something to be done once another package is imported, whichever comes first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(package: str, then: Callable[[], object]) -> None:
    """Call ``then`` after a package was imported: at once if it is there, else when it comes.

    Args:
        package: a top-level name; it is not imported for this.
        then: called once.
    """
    if package in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Waiting(package, then))


class _Waiting(MetaPathFinder):
    def __init__(self, package: str, then: Callable[[], object]):
        self.package, self.then = package, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, with a loader that calls ``then`` behind its own work."""
        if fullname != self.package:
            return None
        for finder in [each for each in sys.meta_path if each is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._call_behind(spec.loader)
                return spec
        return None

    def _call_behind(self, loader: Any) -> None:
        # who only asks whether the package is there gets a loader too, and never runs it
        own = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            own(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then()

        loader.exec_module = exec_module
