"""Other work during a measurement: from the counters of Linux, invented and real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from vitprune_fast.planning.latency import Latency, latencies, latency
from vitprune_fast.planning.waiting import TOLERATED, Waits, load_warning

# the package has the function under the name of the module
module = sys.modules["vitprune_fast.planning.latency"]

QUIET = "cpu 100 0 20 900 5 1 1 0 0 0"


def counters(root: Path, stat: str = QUIET, **threads: str) -> Path:
    """A fake /proc: the first line of its stat, and schedstat of some threads."""
    (root / "proc/self/task").mkdir(parents=True, exist_ok=True)
    (root / "proc/stat").write_text(f"{stat}\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    for name, words in threads.items():
        folder = root / "proc/self/task" / name.strip("t")
        folder.mkdir(exist_ok=True)
        (folder / "schedstat").write_text(words + "\n")
    return root


def waits(moment_s: float, stolen: int = 0, used: int = 0, **threads_ns: int) -> Waits:
    return Waits(moment_s, threads_ns, stolen, used)


def test_counters_are_read(tmp_path: Path) -> None:
    stat = "cpu 100 2 20 900 5 3 4 7 0 0"
    found = Waits.now(counters(tmp_path, stat, t1="500 60 3", t2="9 0 1"))
    assert found is not None
    assert found.threads_ns == {"1": 60, "2": 0}
    assert (found.stolen, found.used) == (7, 100 + 2 + 20 + 3 + 4)


@pytest.mark.parametrize(
    "gone", ["proc/stat", "proc/self/task/1/schedstat", "proc/self/task"], ids=str
)
def test_a_system_that_does_not_count_says_nothing(tmp_path: Path, gone: str) -> None:
    root = counters(tmp_path, t1="500 60 3")
    assert Waits.now(root) is not None
    (root / gone).rename(root / "gone")
    assert Waits.now(root) is None


@pytest.mark.parametrize("stat", ["", "cpu 1 2 3 4", "cpu 1 2 3 4 5 6 7 many"])
def test_counters_that_cannot_be_read_say_nothing(tmp_path: Path, stat: str) -> None:
    assert Waits.now(counters(tmp_path, stat, t1="500 60 3")) is None
    assert Waits.now(counters(tmp_path, t1="500 60")) is None


def test_a_kernel_that_counts_nothing_says_nothing(tmp_path: Path) -> None:
    assert Waits.now(counters(tmp_path, t1="0 0 0", t2="0 0 0")) is None


def test_a_thread_that_ended_meanwhile_is_left_out(tmp_path: Path) -> None:
    root = counters(tmp_path, t1="500 60 3")
    (root / "proc/self/task/2").mkdir()
    found = Waits.now(root)
    assert found is not None and found.threads_ns == {"1": 60}


def test_the_thread_that_waited_longest_counts() -> None:
    before = waits(10.0, one=10**9, two=5 * 10**9, gone=10**12)
    # one waited half a second of two, two not at all, a new one less
    after = waits(12.0, one=15 * 10**8, two=5 * 10**9, new=10**8)
    assert after.share_since(before) == pytest.approx(0.25)
    assert before.share_since(before) == 0.0


def test_what_the_host_took_counts_too() -> None:
    before = waits(0.0, stolen=10, used=1000, one=0)
    # 40 of 80 ticks stolen, after the one that may have begun before
    assert waits(1.0, stolen=51, used=1040, one=0).share_since(before) == pytest.approx(0.5)
    # half waited, and half of the rest stolen
    both = waits(1.0, stolen=51, used=1040, one=5 * 10**8)
    assert both.share_since(before) == pytest.approx(0.75)
    # a single tick says nothing
    assert waits(0.01, stolen=11, used=1000, one=0).share_since(before) == 0.0


def test_the_warning_is_a_sentence_about_the_worst() -> None:
    assert load_warning() == load_warning(None) == load_warning(0.0, TOLERATED, None) == ""
    assert load_warning(0.01, None, 0.48) == (
        "the process waited for a core 48% of the time (other work, a quota, or more threads than "
        "cores), so the times are too long"
    )


class _Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Parameter().new_zeros(1))

    def forward(self, images):
        return images


@pytest.mark.parametrize(("waited_ns", "loaded"), [(4 * 10**8, False), (6 * 10**8, True)])
def test_a_latency_says_that_it_was_measured_under_load(
    monkeypatch: pytest.MonkeyPatch, waited_ns: int, loaded: bool
) -> None:
    moments = iter([waits(0.0, one=0), waits(10.0, one=waited_ns)])
    monkeypatch.setattr(module.Waits, "now", lambda: next(moments))
    found = latencies([_Nothing(), _Nothing()], 1, 4, seconds=0.0, min_runs=1)
    assert [each.waited for each in found] == 2 * [pytest.approx(waited_ns / 1e10)]
    assert [each.loaded for each in found] == 2 * [loaded]
    assert bool(found[0].warning) == loaded


@pytest.mark.parametrize("known", [0, 1])
def test_a_latency_warns_of_nothing_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, known: int
) -> None:
    moments = iter([waits(0.0, one=0) if known else None, None])
    monkeypatch.setattr(module.Waits, "now", lambda: next(moments))
    found = latency(_Nothing(), 1, 4, seconds=0.0, min_runs=1)
    assert found.waited is None and not found.loaded and found.warning == ""
    assert Latency(1, 1.0, 1.0, 1.0, 1) == Latency(1, 1.0, 1.0, 1.0, 1, None)


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """Two processes per core that do nothing but compute, during the test."""
    spin = "print(flush=True)\nwhile True: pass"
    count = 2 * len(os.sched_getaffinity(0))
    started: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            started.append(subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE))
        for process in started:
            assert process.stdout is not None and process.stdout.readline()
        yield
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.communicate()


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").is_file(), reason="this kernel does not count waiting"
)
def test_work_on_all_cores_is_noticed(busy_cores: None) -> None:
    """A core is shared by three, so the process waits for two thirds of the time, far above."""

    class Computing(_Nothing):
        def forward(self, images):
            return sum(range(20_000))

    found = latency(Computing(), 1, 4, seconds=0.5)
    assert found.waited is not None and found.waited > 4 * TOLERATED
    assert found.loaded and "waited for a core" in found.warning
