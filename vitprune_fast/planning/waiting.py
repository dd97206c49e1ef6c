"""How long this process had to wait for a core, as Linux counts it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

TOLERATED = 0.05
"""Share of waiting up to which times are taken to be those of a quiet machine.

It makes them longer by about as much, which is the spread that they have anyway.
"""


@dataclass(frozen=True)
class Waits:
    """Counters at one moment.

    Attributes:
        moment_s: when.
        threads_ns: per thread, how long it has been ready to run while others had the cores.
        stolen: ticks in which the machine that runs this virtual one gave its cores to others.
        used: ticks in which this machine's cores computed, for whomever.
    """

    moment_s: float
    threads_ns: dict[str, int]
    stolen: int
    used: int

    @classmethod
    def now(cls, root: Path = Path("/")) -> Waits | None:
        """The counters; None where the system does not keep them (it is not Linux, say)."""
        threads: dict[str, int] = {}
        slices = 0
        try:
            for folder in (root / "proc/self/task").iterdir():
                try:
                    _, waited, turns = (folder / "schedstat").read_text().split()
                except (FileNotFoundError, ProcessLookupError):
                    # this thread ended; where the kernel keeps no statistics nothing is found
                    continue
                threads[folder.name] = int(waited)
                slices += int(turns)
            of_all_cores = (root / "proc/stat").read_text().partition("\n")[0]
            # user, nice, system, idle, iowait, irq, softirq, steal, ...
            ticks = [int(word) for word in of_all_cores.split()[1:9]]
        except (OSError, ValueError):
            return None
        # a kernel may have the files and count nothing; we at least had a turn
        if slices == 0 or len(ticks) < 8:
            return None
        *used, _, _, irq, softirq, stolen = ticks
        return cls(time.perf_counter(), threads, stolen, sum(used) + irq + softirq)

    def share_since(self, before: Waits) -> float:
        """Share of the time since then, 0 to 1, for which cores were waited for.

        That of the thread that waited the longest, since the others wait for it; and of the time
        that was left, the share that the host of a virtual machine took away.
        """
        longest = max(
            waited - before.threads_ns.get(name, 0) for name, waited in self.threads_ns.items()
        )
        waited = longest / 1e9 / max(self.moment_s - before.moment_s, 1e-9)
        # a counter of whole ticks may be one too far: a short measurement shall not rest on it
        stolen = max(0, self.stolen - before.stolen - 1)
        taken = stolen / max(1, stolen + self.used - before.used)
        return 1 - (1 - min(1.0, max(0.0, waited))) * (1 - taken)


def load_warning(*waited: float | None) -> str:
    """One sentence about times measured while other work ran; empty where none did.

    Args:
        waited: of one or several measurements; None, where it was not known, warns of nothing.
    """
    worst = max((share for share in waited if share is not None), default=0.0)
    if worst <= TOLERATED:
        return ""
    return (
        f"the process waited for a core {worst:.0%} of the time (other work, a quota, or more "
        "threads than cores), so the times are too long"
    )
