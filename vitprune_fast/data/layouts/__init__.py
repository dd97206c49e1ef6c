"""Data sets in folders as their authors ship them, recognised by their own tables: a file each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitprune_fast import registry
from vitprune_fast.data.folder import Folder
from vitprune_fast.data.photographs import Photographs


@dataclass(frozen=True)
class Layout:
    """A way in which a data set is shipped.

    Attributes:
        home: finds the folder that names are relative to, given the one that the user named: the
            same however far above it the user pointed; None where it is no such data set. Looks at
            a few names only.
        source: reads it from there; what is missing is refused.
    """

    home: Callable[[Path], Path | None]
    source: type[Photographs]


def recognised(root: Path) -> tuple[type[Photographs], Path]:
    """What reads the data set in ``root``, and from where: class folders unless tables say more."""
    for name in registry.names("data/layouts"):
        layout: Layout = registry.named("data/layouts", name, "LAYOUT")
        home = layout.home(root)
        if home is not None:
            return layout.source, home
    return Folder, root
