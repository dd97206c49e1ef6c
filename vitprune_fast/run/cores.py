"""How many cores this process may use, and how many threads a run has by default."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from vitprune_fast.errors import InvalidInput

# 16 read about 10,000 images a second, more than most devices take
MOST_WORKERS = 16


def default_threads(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """`OMP_NUM_THREADS` where it is set, else one thread per core that may be used.

    Neither depends on what else runs at the moment: the number of threads decides the bits of a
    run, and a run that is resumed must have it again.

    Args:
        environ: environment variables. Of a list (`4,2`: threads of each level) the first counts.
        root: where /proc and /sys are.

    Raises:
        InvalidInput: `OMP_NUM_THREADS` holds no number of threads.
    """
    words = environ.get("OMP_NUM_THREADS", "").strip()
    if not words:
        return available_cores(root)
    first = words.partition(",")[0].strip()
    if not re.fullmatch("[0-9]+", first) or int(first) < 1:
        raise InvalidInput(
            "vitprune-fast: OMP_NUM_THREADS must be a number of threads, at least 1, got "
            f"{words!r}; unset it, or give --threads"
        )
    return int(first)


def available_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: those of its affinity, or fewer if a cgroup's quota is smaller.

    Of a quota only whole cores count, but at least one. Two threads in 1.5 cores would use up the
    quota after three quarters of every period (100 ms as a rule) and then stand still together: a
    latency that is shorter than a period could not be measured.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Cores allowed by each cgroup that this process is in, or that is around one of those."""
    try:
        memberships = (root / "proc/self/cgroup").read_text()
    except (OSError, UnicodeDecodeError):
        return
    # number, controllers, path; version 2 names no controllers
    for controllers, group in re.findall(r"^\d+:([^:\n]*):/?(.*)$", memberships, re.MULTILINE):
        if controllers and "cpu" not in controllers.split(","):
            continue
        # where systemd and containers mount it; a container may be told the path of the host
        mount = root / "sys/fs/cgroup" / controllers
        folder = mount / group
        # the kernel enforces all of them, so the smallest limits
        for each in (folder, *folder.parents):
            quota = _quota(each)
            if quota is not None:
                yield quota
            if each == mount:
                break


def _quota(folder: Path) -> float | None:
    """Cores that the files of one cgroup allow; None where it has no limit or no such files."""
    try:
        # version 2: "max 100000" or "150000 100000"
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        # without a limit the quota is -1, or a word
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None


def workers_for_a_gpu(cores: int, processes: int) -> int:
    """Loader processes that read for one GPU: its part of the cores, less one to drive it.

    Args:
        cores: that this machine leaves to all of its processes.
        processes: that share them, each with a GPU of its own.
    """
    return max(1, min(MOST_WORKERS, cores // processes - 1))
