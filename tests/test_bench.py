"""The race that every bench runs: what it times, and what it does when results differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import conftest as bench_conftest
from bench import lines
from vitprune_fast.benches.harness import calls_in_a_graph, check_same
from vitprune_fast.benches.place import CPU, on_gpu
from vitprune_fast.benches.shapes import VIT_BASE

ROOT = Path(__file__).parent.parent
# a form takes as many seconds as it says, and every reading of the clock a tick
TICK, UNIT = 2.0**-12, 2.0**-8
BODY = """
import pytest
import torch
import vitprune_fast.timing
from vitprune_fast.timing import entries_of

class Clock:
    now, read = 0.0, 0

    def thread_time(self):
        self.now, self.read = self.now + TICK, self.read + 1
        return self.now

clock = vitprune_fast.timing.time = Clock()

def taking(result, units):
    calls = []

    def form():
        calls.append(1)
        # the first of two rounds is the third call
        clock.now += UNIT * units * len(calls)
        return result

    return form

@pytest.mark.parametrize("size", [1000])
def bench_one(race, size):
    x = torch.ones(size)
    forms = {
        "vitprune": taking(x + 1, 1), "like": taking(1 + x, 2), "unlike": taking(x + WRONG, 1)
    }
    for name in OUT:
        del forms[name]
    try:
        race("add", "ones", forms, device="cpu", bytes_moved=8000)
    finally:
        print(f"read {clock.read} times")

def bench_steps(note_race, note_stages, entries):
    if entries.timed:
        note_race("a model", "cpu", entries_of({"a": [4.0, 2.0], "b": [3.0, 6.0]}, 8, "a"))
        note_stages("a model, cut", "cpu", {"plan": 1.0})
        note_stages("a model, cut", "cpu", {"plan": 1.0, "prune": 2.0})

def bench_study(only_timed):
    pass
"""


def run(tmp_path: Path, *more: str, **names: object) -> tuple[int, list[dict], str]:
    """Status, records and output of a bench."""
    names = {"TICK": TICK, "UNIT": UNIT, "WRONG": 1.5, "OUT": (), **names}
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    (tmp_path / "bench_one.py").write_text(head + BODY)
    options = "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"
    found = tmp_path / "found.jsonl"
    words = [sys.executable, "-m", "pytest", "-v", "-s", "-p", "bench.conftest", "-p", "no:xdist"]
    words += [*options, "--tiny", "--lines", str(found), "--rootdir", str(tmp_path), str(tmp_path)]
    # a worker of pytest-xdist must not time anything, which this process may be
    inherited = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    process = subprocess.run(
        [*words, *more], cwd=ROOT, env=inherited, stdout=PIPE, stderr=STDOUT, text=True
    )
    records = [line for line in lines.read(found) if line["kind"] == "record"]
    assert records, process.stdout
    return process.returncode, records, process.stdout


def entries(path: Path) -> dict[str, dict]:
    """The benchmarks of a file of pytest-benchmark, by name."""
    return {each["name"]: each for each in json.loads(path.read_text())["benchmarks"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, list[dict], str]:
    """A whole run with files of pytest-benchmark: its folder, records and output."""
    folder = tmp_path_factory.mktemp("done")
    files = f"--benchmark-json={folder / 'found.json'}", f"--benchmark-storage={folder / 'kept'}"
    options = "--benchmark-only", "--benchmark-save=first", "--benchmark-columns=min,rounds"
    status, records, said = run(folder, *files, *options)
    assert status == 0, said
    return folder, records, said


def test_every_form_of_a_race_is_an_entry_of_pytest_benchmark(done):
    folder, _, said = done
    found = entries(folder / "found.json")
    ours, like = found["bench_one[1000-vitprune]"], found["bench_one[1000-like]"]
    assert ours["stats"]["data"] == [3 * UNIT + TICK, 4 * UNIT + TICK]
    assert like["stats"]["data"] == [6 * UNIT + TICK, 8 * UNIT + TICK]
    assert like["stats"]["min"] == 6 * UNIT + TICK and like["stats"]["rounds"] == 2
    assert like["group"] == ours["group"] == "add, ones"
    assert like["params"] == {"size": "1000", "form": "like"}
    assert like["fullname"].endswith("bench_one.py::bench_one[1000-like]")
    assert like["options"]["timer"] == "thread_time"
    best = 6 * UNIT + TICK
    assert like["extra_info"] == {
        "spread": round(UNIT / best, 3),
        "gb_per_s": round(8000 / best / 1e9, 1),
        "of_copy": round(TICK / best, 3),
        "times_ours": round(best / (3 * UNIT + TICK), 2),
        "device": "cpu",
    }
    assert (
        "read 0 times" not in said
        and "benchmark 'add, ones': 2 tests" in said
        and "bench_one[1000-unlike]" not in found
    )
    # whole steps and stages
    steps = {name: found[f"bench_steps[{name}]"] for name in ("a", "b", "plan", "prune")}
    assert steps["b"]["group"] == "scoring, a model" and steps["b"]["stats"]["data"] == [3, 6]
    assert steps["b"]["extra_info"]["times_ours"] == 1.5
    assert steps["prune"]["group"] == "a model, cut" and steps["prune"]["stats"]["data"] == [2]
    assert len(found) == 6
    # and the lines that become results hold what they held
    (race,) = [each for each in lines.read(folder / "found.jsonl") if each["kind"] == "scoring"]
    assert race["entries"][1] == {
        **{"name": "b", "seconds": 3.0, "spread": 0.5, "images_per_s": 8 / 3, "times_ours": 1.5},
        **{"of_limit": None, "note": ""},
    }


def test_entries_are_compared_with_kept_ones(done, tmp_path):
    options = "--benchmark-compare", "--benchmark-group-by=param:form", "--benchmark-columns=min"
    options += f"--benchmark-storage={done[0] / 'kept'}", "-k", "bench_one"
    slower = 1.5 * UNIT
    status, _, said = run(tmp_path, *options, "--benchmark-compare-fail=min:40%", UNIT=slower)
    assert status != 0 and "benchmark 'form=like': 2 tests" in said
    assert "bench_one[1000-like] (NOW)" in said and "bench_one[1000-like] (0001_first)" in said
    _, _, regressed = said.partition("Performance has regressed:")
    assert "bench_one[1000-like] (0001_first)" in regressed


def test_without_pytest_benchmark_there_are_our_lines_alone(tmp_path):
    status, records, said = run(tmp_path, "-p", "no:benchmark")
    assert status == 0 and "benchmark 'add" not in said
    times = {record["form"]: record.get("min_us") for record in records}
    us = {"vitprune": 3 * UNIT + TICK, "like": 6 * UNIT + TICK}
    assert times == {"unlike": None, **{form: round(1e6 * s, 2) for form, s in us.items()}}


def test_nothing_is_timed_when_pytest_benchmark_is_disabled(tmp_path):
    status, records, said = run(tmp_path, "--benchmark-disable")
    assert status == 0 and "read 0 times" in said and "bench_study SKIPPED" in said
    # forms are still compared
    assert [record["form"] for record in records] == ["unlike"]


@pytest.mark.parametrize("option", ["--tiny", "benchmark_disable", "neither"])
def test_what_says_nothing_about_speed_leaves_the_committed_results(tmp_path, monkeypatch, option):
    monkeypatch.setattr(bench_conftest, "HERE", tmp_path)
    chosen = {option: True}
    config: Any = SimpleNamespace(
        stash={bench_conftest.FOUND: {name: [] for name in lines.LISTS.values()}},
        getoption=lambda name, default=None: chosen.get(name, default),
        invocation_params=SimpleNamespace(args=()),
    )
    bench_conftest.note(config, "memory", {"device": "cpu"})
    assert len(list(tmp_path.glob("results/*.json"))) == (option == "neither")


def test_a_peer_that_disagrees_is_recorded_and_not_timed(done):
    folder, records, _ = done
    by_form = {record["form"]: record for record in records}
    assert "within" in by_form["unlike"]["disagrees"] and "min_us" not in by_form["unlike"]
    assert by_form["vitprune"]["times_ours"] == 1.0 and by_form["like"]["min_us"] > 0
    # what ends a test is a line too
    tests = [each for each in lines.read(folder / "found.jsonl") if each["kind"] == "test"]
    assert [test["failed"] for test in tests] == [False] * 3


def test_nothing_is_timed_when_no_other_form_is_like_ours(tmp_path):
    status, records, _ = run(tmp_path, "-k", "bench_one", OUT=("like",))
    assert status == 1
    assert [record["form"] for record in records] == ["unlike"]
    assert "min_us" not in records[0]


def test_results_of_no_elements_are_the_same():
    check_same("a form", [torch.zeros(0)], [torch.zeros(0)])
    with pytest.raises(AssertionError, match="of shape"):
        check_same("a form", [torch.zeros(0)], [torch.zeros(1)])


def test_a_graph_holds_about_a_millisecond():
    assert [calls_in_a_graph(seconds) for seconds in (1.0, 1e-3, 1e-4, 0.0)] == [1, 1, 10, 50]


def test_tiny_sizes_are_for_a_cpu_too():
    place = on_gpu(tiny=True, compiled=False)
    assert place.batch(256) < 256 and place.shape(VIT_BASE).width < VIT_BASE.width
    if not torch.cuda.is_available():
        # what the interpreter of Triton gets wrong
        assert place.device == "cpu" and place.dtype(torch.bfloat16) == torch.float32
    assert CPU.batch(4) == 4 and CPU.shape(VIT_BASE) == VIT_BASE and not CPU.smaller
    assert CPU.dtype(torch.bfloat16) == torch.bfloat16
