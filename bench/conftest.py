"""Races between forms of one op: interleaved, checked equal first, written as JSON.

On a CPU: time of one thread on the processor, so that a busy machine does not count. On a GPU: time
on the stream of calls that are replayed from a graph, and by itself what the host needs for one
call. What is stated is the minimum; median and spread show the noise. The limit is a plain copy
that moves as many bytes, raced against the forms in the same process. Where pytest-benchmark is
installed, each form is one of its entries (``bench/entries.py``).
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import lines, report_lines
from bench.entries import Entries, WithBenchmark, WithoutBenchmark
from bench.harness import (
    Within,
    check_same,
    host_seconds,
    in_a_graph,
    keep_freed_memory,
    tensors,
)
from bench.place import Place, on_gpu
from vitprune_fast._version import __version__
from vitprune_fast.doctor import doctor
from vitprune_fast.timing import Entry, in_turns, measure, spread

ROUNDS = {"cpu": 30, "cuda": 12}
# one measurement repeats the call until it takes about this long
MEASUREMENT_S = 4e-3
# what measures, by device, as entries of pytest-benchmark name their timer
CLOCKS = {"cpu": "thread_time", "cuda": "cuda_events"}
# the limit, which is raced as the forms are
COPY = "a plain copy of as many bytes"
HERE = Path(__file__).parent
# what was found so far, by the names of lists in a results file
FOUND = pytest.StashKey[dict[str, list]]()
Record = Callable[..., None]


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


def facts(device: str) -> dict:
    """What a results file says of the machine and the code."""
    report = doctor()
    return {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "commit": commit(),
        "device": report.devices["cuda:0" if device == "cuda" else "cpu"],
        "instructions": report.native.get("built with cpu_instructions", "unknown"),
        "versions": {**report.versions, "vitprune_fast": __version__},
        "system": platform.system(),
        # above the number of cores the caches were shared with others
        "load_average": round(os.getloadavg()[0], 1),
    }


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
    found = facts(finding["device"])
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
        forms = [asdict(entry) for entry in found]
        for form in forms:
            facts = {name: form[name] for name in ("times_ours", "images_per_s", "spread")}
            facts |= {"of_limit": form["of_limit"], "note": form["note"], "device": device}
            taken = form.pop("taken")
            entries.add(form["name"], f"{kind}, {case}", taken, facts, CLOCKS[device])
        note(request.config, kind, {"case": case, "device": device, "entries": forms})

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


@dataclass(frozen=True)
class Timed:
    """What is timed for a form.

    Args:
        call: runs the form ``calls`` times.
        calls: above 1 for graphs.
        clock: what measures it.
        facts: what a record says of it.
    """

    call: Callable[[], object]
    calls: int
    clock: str
    facts: dict[str, Any]


def timed(call: Callable[[], object], device: str) -> Timed:
    """The call itself, or on a GPU a graph of calls where they can be captured."""
    if device != "cuda":
        return Timed(call, 1, CLOCKS[device], {})
    facts: dict[str, Any] = {"host_us": round(host_seconds(call) * 1e6, 1)}
    try:
        replay, calls = in_a_graph(call)
        return Timed(replay, calls, "graph_replays", {**facts, "timed": "replays of a graph"})
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"cannot be captured: {str(error).splitlines()[0]}")
        return Timed(call, 1, CLOCKS[device], {**facts, "timed": "calls of the host"})


@pytest.fixture
def race(request: pytest.FixtureRequest, entries: Entries):
    """Function that checks, times and records the forms of one op; the first is ours.

    With ``exact`` the results must be equal, else within the rounding of their dtype, or of the one
    that they are ``computed`` in. A form that has another result is recorded as one that disagrees,
    and not timed; when no other form is like ours, nothing is timed and the race fails.
    """
    tiny = request.config.getoption("--tiny")

    def agreeing(op: str, case: str, forms: dict[str, Callable], device: str, within: Within):
        """The forms with our result; what the others have is recorded."""
        (name, ours), *others = forms.items()
        wanted = tensors(ours())
        found, complaints = {name: ours}, []
        for name, other in others:
            try:
                label = f"{op}: form {name!r} of case {case!r}"
                check_same(label, wanted, tensors(other()), within)
            except AssertionError as error:
                record = {"op": op, "case": case, "form": name, "device": device}
                note(request.config, "record", {**record, "disagrees": str(error)})
                complaints.append(str(error))
            else:
                found[name] = other
        if complaints and len(found) == 1:
            raise AssertionError("\n".join(complaints))
        return found

    def run(
        op: str,
        case: str,
        forms: dict[str, Callable],
        *,
        device: str,
        bytes_moved: int,
        exact: bool = False,
        computed: torch.dtype | None = None,
        rounds: int | None = None,
    ):
        torch.set_num_threads(1)
        case += compiled_note(request.config)
        forms = agreeing(op, case, forms, device, 0.0 if exact else computed)
        if not entries.timed:
            return
        # read and written once each, like the bytes that the op has to move
        source = torch.zeros(bytes_moved // 2, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        raced = {name: timed(call, device) for name, call in forms.items()}
        raced[COPY] = timed(lambda: target.copy_(source), device)

        def turn(form: Timed) -> Callable[[], float]:
            seconds = max(measure(form.call, device, 1 if tiny else 3), 1e-7)
            repeats = 1 if tiny else max(1, int(MEASUREMENT_S / seconds))
            return lambda: measure(form.call, device, repeats) / form.calls

        turns = {name: turn(form) for name, form in raced.items()}
        # the first measurements of each were those that told how often to repeat it
        times = in_turns(turns, 2 if tiny else rounds or ROUNDS[device], warm_up=False)
        limit = min(times.pop(COPY))
        best_of_ours = min(times[next(iter(forms))])
        for name, taken in times.items():
            best, form = min(taken), raced[name]
            facts = {
                "spread": round(spread(taken), 3),
                "gb_per_s": round(bytes_moved / best / 1e9, 1),
                "of_copy": round(limit / best, 3),
                "times_ours": round(best / best_of_ours, 2),
                **form.facts,
            }
            record = {
                "op": op,
                "case": case,
                "form": name,
                "device": device,
                "min_us": round(best * 1e6, 2),
                "median_us": round(statistics.median(taken) * 1e6, 2),
                "rounds": len(taken),
                **facts,
            }
            note(request.config, "record", record)
            facts["device"] = device
            entries.add(name, f"{op}, {case}", taken, facts, form.clock, forms[name])

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
