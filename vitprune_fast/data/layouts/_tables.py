"""Tables of text that say which image has which label, and whether the images are those."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from vitprune_fast.data.archive import is_image, natural_key
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.files import open_regular

# ten times the largest, the boxes of ImageNet's validation images
MAX_TABLE_BYTES = 1 << 26


def rows(table: Path, separator: str | None, columns: int) -> Iterator[list[str]]:
    """The lines of a table that are not blank, cut at the separator (None: at white space).

    Raises:
        DamagedFile: it cannot be read, is no text, has over 64 MiB, or one of the first ``columns``
            of a line is missing or empty.
    """
    try:
        with open_regular(table) as file:
            content = file.read(MAX_TABLE_BYTES + 1)
        if len(content) > MAX_TABLE_BYTES:
            raise ValueError(f"more than {MAX_TABLE_BYTES} bytes")
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DamagedFile(
            f"open_data: {table} must be a readable table, got {reason}; unpack it again"
        ) from None
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split(separator)]
        if any(cells):
            if len(cells) < columns or not all(cells[:columns]):
                raise DamagedFile(
                    f"open_data: every line of {table} must have {columns} columns, "
                    f"got {line[:100]!r} in line {number}"
                )
            yield cells


def images_in(folder: Path) -> list[str]:
    """The image files right in a folder, in the order people count in; none where it is missing."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        found = [entry.name for entry in entries if is_image(entry.name)]
    return sorted(found, key=natural_key)


def check_same(
    there: Collection[str], listed: Collection[str], folder: Path, table: Path | str
) -> None:
    """Refuse a folder that does not hold exactly what a table lists, each name once.

    Args:
        there: the names in the folder.
        listed: the names in the table.
        folder: the folder, for people.
        table: the table, for people.
    """
    check_once(listed, table)
    check_listed(there, listed, folder, table)
    missing = sorted({*listed} - {*there}, key=natural_key)
    if missing:
        raise InvalidInput(
            f"open_data: {folder} must hold everything listed in {table}, got no {missing[0]}"
            f"{others(missing)}; unpack the data set again, or take what is missing out of the list"
        )


def check_once(names: Collection[str], where: Path | str) -> None:
    """Refuse a table or a folder that has a name twice."""
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise DamagedFile(
                f"open_data: {where} must have every name once, got {name} {times} times; remove "
                "what is wrong"
            )


def check_listed(
    there: Collection[str], listed: Collection[str], folder: Path, table: Path | str
) -> None:
    """Refuse what lies in a folder and has no line in a table; see ``check_same``."""
    unknown = sorted({*there} - {*listed}, key=natural_key)
    if unknown:
        raise InvalidInput(
            f"open_data: {folder} must hold nothing that is not listed in {table}, got {unknown[0]}"
            f"{others(unknown)}; remove it, or take the table that belongs to it"
        )


def others(names: Collection[object]) -> str:
    """How many there are besides the one that is shown."""
    return f" and {len(names) - 1:,} more" if len(names) > 1 else ""
