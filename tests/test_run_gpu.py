"""The two parts of `make gpu`, on a machine that need not have a GPU."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_facts, lines, run_gpu, table
from bench.run_gpu import ROOT, Run, Step

QUICK = {
    "passed": "pass",
    "failed": "raise SystemExit(1)",
    "nothing to run": "raise SystemExit(5)",
    "stopped after 5 s": "import time; time.sleep(3600)",
}
# packages that a machine with a GPU may lack; found anywhere, they are not there
HIDDEN = ("tyro", "datasets", "torch_pruning", "webdataset", "transformers")
HIDE = f"""
from importlib.machinery import PathFinder
from importlib.util import find_spec
hidden, found = {HIDDEN}, PathFinder.find_spec
def find(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else found(name, path, target)
PathFinder.find_spec = find
assert find_spec("tyro") is None
"""


def step(code: str, limit_s: float = 5.0, **more) -> Step:
    return Step("one", (sys.executable, "-c", code), limit_s, **more)


@pytest.mark.parametrize("status", QUICK)
def test_a_step_tells_how_it_ended_and_what_it_said(tmp_path, status):
    run = Run(tmp_path, 600.0)
    with (tmp_path / "log.txt").open("a") as log:
        code = f"print('said', flush=True); {QUICK[status]}"
        assert run.run(step(code, 60.0 if "stopped" not in status else 5.0), log) == status
    assert "said" in (tmp_path / "log.txt").read_text()
    (line,) = lines.read(tmp_path / "found.jsonl")
    assert line["status"] == status and line["seconds"] > 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cases"] == {"one": {"status": status, "seconds": line["seconds"]}}


def test_a_step_that_cannot_run_here_is_told_and_costs_nothing(tmp_path):
    run = Run(tmp_path, 600.0)
    assert run.run(Step("one", ("no-such-program",), 5.0), sys.stdout) == "not installed"
    missing = str(run_gpu.PACKAGE / "no such folder" / "one.py")
    words = (sys.executable, missing)
    assert run.run(Step("two", words, 5.0), sys.stdout) == "not installed"
    assert Run(tmp_path, 1.0).run(step("pass"), sys.stdout) == "not started"


def test_nothing_runs_beside_what_is_timed(tmp_path):
    run = Run(tmp_path, 600.0)
    file = tmp_path / "ended"
    beside = f"import time; time.sleep(2); open({str(file)!r}, 'w').close()"
    with (tmp_path / "log.txt").open("a") as log:
        assert run.run(step(beside, 60.0, beside=True), log) == "running beside"
        assert run.run(step("pass", 60.0), log) == "passed" and not file.exists()
        assert run.run(step(f"open({str(file)!r})", 60.0, alone=True), log) == "passed"
    assert [line["status"] for line in lines.read(run.found)] == ["passed"] * 3


def test_processes_of_a_step_that_is_cut_are_ended(tmp_path):
    file = tmp_path / "pid"
    code = "import subprocess as s, sys; p = s.Popen(['sleep', '3600']); "
    code += f"open({str(file)!r}, 'w').write(str(p.pid)); p.wait()"
    with (tmp_path / "log.txt").open("a") as log:
        assert "stopped" in Run(tmp_path, 600.0).run(step(code, 20.0), log)
    started = Path("/proc", file.read_text(), "stat")
    # nobody may have asked yet how it ended
    assert not started.is_file() or started.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_all_files_of_all_steps_exist_and_every_bench_for_a_gpu_is_in_one():
    words = [word for part in (1, 2) for each in run_gpu.steps(part, False) for word in each.words]
    files = {word for word in words if word.startswith(("tests/", "bench/"))}
    assert all((ROOT / file).exists() for file in files)
    marked = {
        f"bench/{path.name}"
        for path in (ROOT / "bench").glob("bench_*.py")
        if "mark.gpu" in path.read_text()
    }
    assert len(marked) > 10 and marked <= files
    names = [each.name for part in (1, 2) for each in run_gpu.steps(part, False)]
    assert {name for name in names if names.count(name) > 1} <= {"facts", "native code"}


def test_every_test_for_a_gpu_is_in_part_1():
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu\n" in path.read_text() and path.name != "test_run_gpu.py"
    }
    named = {*run_gpu.GPU_FILES, *(file for file in marked if file.startswith("tests/ops/"))}
    assert marked == named


def test_a_line_that_was_cut_is_left_out(tmp_path):
    path = tmp_path / "found.jsonl"
    lines.append(path, "record", {"op": "a", "case": "b", "form": "c"})
    path.write_text(path.read_text() + '{"kind": "rec')
    assert [line["op"] for line in lines.read(path)] == ["a"]
    assert lines.read(tmp_path / "none") == []


def test_what_was_run_again_counts_and_races_are_put_together(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    for folder, status, us in ((first, "failed", 2.0), (second, "passed", 1.0)):
        folder.mkdir()
        found = folder / "found.jsonl"
        lines.replace(folder / "facts.json", {"device": "a GPU, sm_90", "date": "2026-11-28"})
        lines.append(found, "step", {"name": "one", "status": status, "seconds": us})
        lines.append(found, "test", {"test": "t", "failed": status == "failed", "seconds": 1})
        record = {"op": "a", "case": "b", "device": "cuda"}
        lines.append(found, "record", {**record, "form": "c", "min_us": us})
        race = {"case": "d", "device": "cuda", "entries": [{"name": folder.name}]}
        lines.append(found, "training", race)
    content = lines.combined(first, second)
    assert content["cases"] == {"one": {"status": "passed", "seconds": 1.0}}
    assert content["failed"] == [] and content["tests_passed"] == 1
    assert [record["min_us"] for record in content["records"]] == [1.0]
    assert [each["name"] for each in content["training"][0]["entries"]] == ["1", "2"]
    assert lines.combined(first)["failed"][0]["test"] == "t"


def test_results_of_both_parts_become_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines.replace(tmp_path / "facts.json", {"device": "A GPU 9, sm_90", "date": "2026-11-28"})
    assert table.added([tmp_path]).name == "202611_a-gpu-9.json"
    with pytest.raises(SystemExit, match="must name folders of `make gpu`, got"):
        table.added([tmp_path / "none"])


def test_what_failed_is_run_again_first(tmp_path):
    found = tmp_path / "found.jsonl"
    fault = "tests/ops/test_a.py::test_b[triton]"
    lines.append(found, "test", {"test": fault, "failed": True, "seconds": 1})
    lines.append(found, "test", {"test": "tests/ops/test_a.py::c", "failed": False, "seconds": 1})
    for name, status in (("small sizes", "failed"), ("bench gather", "stopped after 30 s")):
        lines.append(found, "step", {"name": name, "status": status, "seconds": 1})
    for name in ("target sizes", "other gpu tests", "bench gated attention"):
        lines.append(found, "step", {"name": name, "status": "passed", "seconds": 1})
    again = run_gpu.failed_before(tmp_path)
    assert again[0].words[-1] == fault and "tests/ops/test_a.py::c" not in again[0].words
    # what was cut, and what did not even begin
    assert [each.name for each in again[1:]] == [
        "memory of the kernels",
        "bench activation score",
        "bench gather",
    ]
    assert run_gpu.failed_before(None) == []
    part = [each.name for each in run_gpu.steps(2, True, tmp_path)]
    assert part.index("bench gather") < part.index("bench scoring")


def test_facts_are_there_without_the_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_facts.gpu_facts() == ""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'A GPU, 580.1, 1980 MHz, 3201 MHz, 700.00 W'\n")
    program.chmod(0o755)
    assert gpu_facts.gpu_facts().startswith("name A GPU, driver_version 580.1, clocks.max.sm 1980")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_a_gpu_it_is_refused_in_one_sentence(tmp_path, capsys):
    assert run_gpu.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert said == "make gpu: torch must see a CUDA device, got none; --tiny runs on a CPU\n"


def test_wrong_arguments_are_told_in_one_sentence(tmp_path, capsys):
    common = ["--out", str(tmp_path), "--tiny"]
    assert run_gpu.main([*common, "--only", "bench x"]) == 2
    assert "--only must be among facts, " in capsys.readouterr().out
    assert run_gpu.main([*common, "--part", "2", "--again", str(tmp_path / "none")]) == 2
    assert "--again must be the folder of a run, got " in capsys.readouterr().out


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """An environment without git, and without packages that a machine may lack."""
    (tmp_path / "path").mkdir()
    for name in ("cc", "c++", "gcc", "g++", "ld", "as", "sh", "uname"):
        for folder in os.environ["PATH"].split(os.pathsep):
            if Path(folder, name).is_file():
                (tmp_path / "path" / name).symlink_to(Path(folder, name))
                break
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDE)
    paths = {"PATH": str(tmp_path / "path"), "PYTHONPATH": str(tmp_path / "site")}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {**inherited, **paths}


def command(out: Path, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "run_gpu.py"), "--out", str(out), "--tiny", *words]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(torch.cuda.is_available(), reason="another device than its own")
def test_both_parts_run_on_a_cpu_without_git_and_other_packages(tmp_path, bare):
    folders = [tmp_path / "1", tmp_path / "2"]
    for part, folder in enumerate(folders, 1):
        words = ["--part", str(part), "--budget", "600"]
        done = subprocess.run(
            command(folder, *words, *(["--again", str(folders[0])] if part == 2 else [])),
            env=bare,
            capture_output=True,
            text=True,
        )
        said = done.stdout + (folder / "log.txt").read_text()[-6000:]
        assert done.returncode == 0, said
        files = sorted(path.name for path in folder.iterdir())
        assert len(files) <= 8
        kinds = {Path(name).suffix for name in files} - {".txt"}
        assert kinds <= {".json", ".jsonl"}, files
    content = lines.combined(*folders)
    assert content["failed"] == [] and content["tests_passed"] > 10
    for name in ("records", "scoring", "training", "memory", "stages"):
        assert content[name], name
    ops = {record["op"] for record in content["records"]}
    assert {"gated_attention", "activation_score", "norm_score", "gather_all"} <= ops
    assert all("disagrees" not in record for record in content["records"])
    assert content["installed"]["tyro"] is False and content["commit"]
    # what such a file becomes
    for made in (table.table, table.races, table.training_races, table.stages, table.kernels):
        assert made(content)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="another device than its own")
def test_a_run_that_is_cut_at_any_moment_keeps_what_had_ended(tmp_path, bare):
    moments = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))
    for number in range(3):
        out = tmp_path / str(number)
        process = subprocess.Popen(
            command(out, "--only", "facts", "bench activation score", "bench gather"),
            env=bare,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds = moments.uniform(1, 60)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        told = [line.partition(":")[0] for line in said.splitlines() if ": passed" in line]
        found = lines.read(out / "found.jsonl")
        kept = [line["name"] for line in found if line["kind"] == "step"]
        assert kept[: len(told)] == told, f"after {seconds:.1f} s"
        for path in out.glob("*.json"):
            json.loads(path.read_text())
        records = [line for line in found if line["kind"] == "record"]
        if "bench activation score" in kept:
            assert len(records) >= 6
        assert len(lines.combined(out)["records"]) == len(records)
        # a step of a run that was killed may go on for a while
        time.sleep(0.1)
