"""The race that every bench runs: what it times, and what it does when results differ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import lines
from bench.place import CPU, on_gpu
from bench.shapes import VIT_BASE
from bench.timing import calls_in_a_graph, check_same

ROOT = Path(__file__).parent.parent
BODY = """
import torch

def bench_one(race):
    x = torch.ones(1000)
    forms = {"vitprune": lambda: x + 1, "like": lambda: 1 + x, "unlike": lambda: x + WRONG}
    for name in OUT:
        del forms[name]
    race("add", "ones", forms, device="cpu", bytes_moved=8000)
"""


def run(tmp_path: Path, **names: object) -> tuple[int, list[dict]]:
    """Status and records of a bench."""
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    (tmp_path / "bench_one.py").write_text(head + BODY)
    options = "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"
    found = tmp_path / "found.jsonl"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "bench.conftest", "-p", "no:xdist"]
    words += [*options, "--tiny", "--lines", str(found), "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    records = [line for line in lines.read(found) if line["kind"] == "record"]
    assert records, done.stdout + done.stderr
    return done.returncode, records


def test_a_peer_that_disagrees_is_recorded_and_not_timed(tmp_path):
    status, records = run(tmp_path, WRONG=1.5, OUT=())
    assert status == 0
    by_form = {record["form"]: record for record in records}
    assert "within" in by_form["unlike"]["disagrees"] and "min_us" not in by_form["unlike"]
    assert by_form["vitprune"]["times_ours"] == 1.0 and by_form["like"]["min_us"] > 0
    # what ends a test is a line too
    (test,) = [each for each in lines.read(tmp_path / "found.jsonl") if each["kind"] == "test"]
    assert not test["failed"]


def test_nothing_is_timed_when_no_other_form_is_like_ours(tmp_path):
    status, records = run(tmp_path, WRONG=1.5, OUT=("like",))
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
