"""`vitprune-fast doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from vitprune_fast.cli.options import parse
from vitprune_fast.config.run import Threads


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices, compilers, and which backend every op takes here and why."""

    threads: Threads = None


def main(words: list[str]) -> None:
    """Prints what `vp.doctor()` finds."""
    options = parse("doctor", words, lambda chosen: Doctor())
    import vitprune_fast as vp
    from vitprune_fast.run.profile import applied, choose_profile

    with applied(choose_profile("cpu", options.threads)):
        print(vp.doctor())
