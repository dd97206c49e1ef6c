"""Benches as tests: what races find, written as JSON.

Where pytest-benchmark is installed, each form is one of its entries (``bench/entries.py``).
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import lines, report_lines
from bench.entries import Entries, WithBenchmark, WithoutBenchmark
from vitprune_fast.benches.harness import keep_freed_memory
from vitprune_fast.benches.place import Place, on_gpu
from vitprune_fast.benches.race import CLOCKS, Race
from vitprune_fast.benches.results import facts, step_race
from vitprune_fast.doctor import doctor
from vitprune_fast.timing import Entry

HERE = Path(__file__).parent
# what was found so far, by the names of lists in a results file
FOUND = pytest.StashKey[dict[str, list]]()
Record = Callable[..., None]
# of a form of whole steps, for pytest-benchmark
FACTS = ("times_ours", "images_per_s", "spread", "of_limit", "note")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json", type=Path, help="where results go (bench/results/<month>_<device>)")
    parser.addoption("--lines", type=Path, help="add each finding to this file, and write no other")
    parser.addoption("--tiny", action="store_true", help="the smallest sizes, on a CPU too")
    parser.addoption("--compiled", action="store_true", help="race against torch.compile")


def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()
    has_benchmark = config.pluginmanager.hasplugin("benchmark")
    config.pluginmanager.register(WithBenchmark() if has_benchmark else WithoutBenchmark())
    if path := config.getoption("--lines"):
        config.pluginmanager.register(report_lines.Lines(path, note=compiled_note(config)))
    config.stash[FOUND] = {name: [] for name in lines.LISTS.values()}


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Place:
    """Where what is marked gpu runs."""
    option: Any = request.config.getoption
    return on_gpu(option("--tiny"), option("--compiled"))


def device_name(device: str) -> str:
    """Name of the processor or GPU as part of a file name."""
    name = torch.cuda.get_device_name() if device == "cuda" else doctor().devices["cpu"]
    return lines.as_file_name(name)


def commit() -> str:
    """Short name of the commit, marked when files other than those benches write have changed."""

    def git(*words: str) -> str:
        result = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
        return result.stdout.strip()

    try:
        written = (":!results", ":/!vitprune_fast/distill/attention.json")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
    except OSError:
        return "unknown"


def note(config: pytest.Config, kind: str, finding: dict) -> None:
    """Keep one finding at once, so that an interrupted run keeps its results.

    Args:
        config: of the run.
        kind: one of :data:`bench.lines.LISTS`.
        finding: has the name of its ``device``.
    """
    config.stash[FOUND][lines.LISTS[kind]].append(finding)
    if path := config.getoption("--lines"):
        lines.append(path, kind, finding)
        return
    path = config.getoption("--json")
    if not path and (config.getoption("--tiny") or config.getoption("benchmark_disable", False)):
        # says nothing about speed: the committed results stay
        return
    found = facts(finding["device"], commit())
    month = found["date"][:7].replace("-", "")
    path = path or HERE / "results" / f"{month}_{device_name(finding['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = "python -m pytest " + shlex.join(config.invocation_params.args)
    lines.replace(path, {"command": command, **found, **config.stash[FOUND]})


def compiled_note(config: pytest.Config) -> str:
    """What tells a race against compiled forms from the other one, of another process."""
    return ", against compiled forms" if config.getoption("--compiled") else ""


@pytest.fixture
def note_race(request: pytest.FixtureRequest, entries: Entries) -> Record:
    """Function that records the race of whole ``scoring`` or ``training`` steps."""

    def record(case: str, device: str, found: list[Entry], kind: str = "scoring") -> None:
        case += compiled_note(request.config)
        for entry in found:
            facts = {name: getattr(entry, name) for name in FACTS} | {"device": device}
            entries.add(entry.name, f"{kind}, {case}", entry.taken, facts, CLOCKS[device])
        note(request.config, kind, step_race(case, device, found))

    return record


def note_memory(config: pytest.Config, case: str, device: str, found: dict[str, int]) -> None:
    """Record bytes of peak memory, by what needed them."""
    note(config, "memory", {"case": case, "device": device, **found})
    print(case, found)


@pytest.fixture
def note_stages(request: pytest.FixtureRequest, entries: Entries) -> Record:
    """Function that records wall seconds of stages, by their names, as they become more."""
    entered: set[str] = set()

    def record(case: str, device: str, seconds: dict[str, float]) -> None:
        note(request.config, "stages", {"case": case, "device": device, "seconds": seconds})
        for name in [name for name in seconds if name not in entered]:
            entries.add(name, case, [seconds[name]], {"device": device}, "perf_counter")
            entered.add(name)

    return record


@pytest.fixture
def only_timed(entries: Entries) -> None:
    """For what does nothing but measure time."""
    if not entries.timed:
        pytest.skip("nothing is timed (--benchmark-disable), and here is nothing to check")


@pytest.fixture
def race(request: pytest.FixtureRequest, entries: Entries) -> Race:
    """What checks, times and records the forms of one op."""
    config: Any = request.config
    return Race(
        lambda record: note(config, "record", record),
        entries.add,
        tiny=config.getoption("--tiny"),
        suffix=compiled_note(config),
        times=entries.timed,
    )
