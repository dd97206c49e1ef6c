"""`vitprune-fast doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from vitprune_fast.cli.options import parse


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices, compilers, and which backend every op takes here and why."""


def main(words: list[str]) -> int:
    """Prints what `vp.doctor()` finds."""
    if parse("doctor", words, lambda chosen: Doctor()) is None:
        return 0
    import vitprune_fast as vp

    print(vp.doctor())
    return 0
