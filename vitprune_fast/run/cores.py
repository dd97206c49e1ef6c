"""How many cores this process may use, and how many threads a run has unless it is told."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from vitprune_fast.errors import InvalidInput

# a line of /proc/self/cgroup: number, controllers, path
_MEMBERSHIP = re.compile(r"^\d+:([^:\n]*):(.+)$", re.MULTILINE)
# a line of /proc/self/mountinfo: what of the hierarchy is mounted, where, and which controllers
_CGROUP_MOUNT = re.compile(r"^\S+ \S+ \S+ (\S+) (\S+) .*- (cgroup2?) \S+ (\S+)$", re.MULTILINE)


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
    for mount, group in _hierarchies(root):
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


def _hierarchies(root: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    """Where the hierarchies that can limit cores are mounted, and this process's place below."""
    try:
        memberships = (root / "proc/self/cgroup").read_text()
        mounts = (root / "proc/self/mountinfo").read_text()
    except (OSError, UnicodeDecodeError):
        return
    # version 2 names no controllers
    groups = {
        controller: PurePosixPath(path)
        for controllers, path in _MEMBERSHIP.findall(memberships)
        for controller in controllers.split(",")
    }
    for top, place, kind, options in _CGROUP_MOUNT.findall(mounts):
        controller = "" if kind == "cgroup2" else "cpu"
        if controller not in groups or (controller and controller not in options.split(",")):
            continue
        mount, group = root / _unescaped(place).lstrip("/"), groups[controller]
        # a container often mounts its own cgroup only, and is told the path of the host
        inside = group.is_relative_to(_unescaped(top))
        yield mount, group.relative_to(_unescaped(top)) if inside else PurePosixPath()


def _unescaped(path: str) -> str:
    """A path of mountinfo, where spaces and the like are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
