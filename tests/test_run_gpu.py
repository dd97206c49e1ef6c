"""The two parts of `make gpu`, on a machine that need not have a GPU."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_facts, gpu_steps, lines, run_gpu, table
from bench.gpu_steps import PACKAGE, ROOT, Step, steps
from bench.run_gpu import Run

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
class Find:
    # not a function, which would become a method of whatever class holds it
    def __call__(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else found(name, path, target)
PathFinder.find_spec = Find()
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
    missing = str(PACKAGE / "no such folder" / "one.py")
    words = (sys.executable, missing)
    assert run.run(Step("two", words, 5.0), sys.stdout) == "not installed"
    assert Run(tmp_path, 1.0).run(step("pass"), sys.stdout) == "not started"


def test_nothing_runs_beside_what_is_timed(tmp_path):
    run = Run(tmp_path, 600.0)
    code = "import time; time.sleep(3600)"
    with (tmp_path / "log.txt").open("a") as log:
        assert run.run(step(code, 60.0, background=True), log) == "runs in the background"
        assert run.run(step("pass", 60.0, background=True), log) == "runs in the background"
        assert run.run(step("import time; time.sleep(1)", 60.0), log) == "passed"
        (_, process, _), _ = run.background
        assert process.poll() is None
        assert run.run(step("pass", 60.0, alone=True), log) == "passed"
    assert process.poll() == -signal.SIGKILL
    ended = [line["status"] for line in lines.read(run.found)]
    assert ended[0] == ended[2] == ended[3] == "passed" and ended[1].startswith("stopped after")


def test_processes_of_a_step_that_is_cut_are_ended(tmp_path):
    file = tmp_path / "pid"
    code = "import subprocess as s, sys; p = s.Popen(['sleep', '3600']); "
    code += f"open({str(file)!r}, 'w').write(str(p.pid)); p.wait()"
    with (tmp_path / "log.txt").open("a") as log:
        assert "stopped" in Run(tmp_path, 600.0).run(step(code, 8.0), log)
    # a busy machine takes its time to end a process, and nobody may have asked yet how it ended
    for _ in range(100):
        state = reading(Path("/proc", file.read_text(), "stat")).rpartition(")")[2].split()
        if not state or state[0] in "ZX":
            return
        time.sleep(0.1)
    raise AssertionError(f"the process that the step started is still there: {state[0]}")


def test_all_files_of_all_steps_exist_and_every_bench_for_a_gpu_is_in_one():
    words = [word for part in (1, 2) for each in steps(part) for word in each.words]
    files = {word for word in words if word.startswith(("tests/", "bench/"))}
    assert all((ROOT / file).exists() for file in files)
    texts = {path.name: path.read_text() for path in (ROOT / "bench").glob("bench_*.py")}
    for name, text in texts.items():
        for op in re.findall(r"from vitprune_fast\.benches\.ops\.(\w+) import", text):
            texts[name] += (ROOT / f"vitprune_fast/benches/ops/{op}.py").read_text()
    gpu = ("mark.gpu", "as_tests(")
    marked = {f"bench/{name}" for name, text in texts.items() if any(word in text for word in gpu)}
    assert len(marked) > 10 and marked <= files
    names = [each.name for part in (1, 2) for each in steps(part, native=False)]
    both = {"facts", "native code", "facts, native code built"}
    assert {name for name in names if names.count(name) > 1} == both
    # what is raced against compiled forms has such forms
    compiled = [each for each in steps(2) if "--compiled" in each.words]
    raced = {word for each in compiled for word in each.words if word.startswith("bench/")}
    with_forms = {f"bench/{name}" for name, text in texts.items() if ".compiled" in text}
    assert raced - {"bench/bench_attention_score.py"} == with_forms


def test_every_test_for_a_gpu_is_in_part_1():
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu\n" in path.read_text() and path.name != "test_run_gpu.py"
    }
    named = {*gpu_steps.GPU_FILES, *(file for file in marked if file.startswith("tests/ops/"))}
    assert marked == named


def test_a_line_that_was_cut_is_left_out_and_the_next_is_not(tmp_path):
    path = tmp_path / "found.jsonl"
    lines.append(path, "record", {"op": "a", "case": "b", "form": "c"})
    path.write_text(path.read_text() + '{"kind": "rec')
    assert [line["op"] for line in lines.read(path)] == ["a"]
    lines.append(path, "record", {"op": "d"})
    assert [line["op"] for line in lines.read(path)] == ["a", "d"]
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


def test_facts_that_were_cut_before_torch_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    facts = {"gpu": "name A GPU 9, driver_version 1", "date": "2026-11-28"}
    lines.replace(tmp_path / "facts.json", facts)
    assert table.added([tmp_path]).name == "202611_name-a-gpu-9.json"
    assert "unknown" in table.table(lines.combined(tmp_path))


def test_what_did_not_end_well_is_run_again_first(tmp_path):
    found = tmp_path / "found.jsonl"
    for name, status in (("small sizes", "failed"), ("bench gather", "stopped after 30 s")):
        lines.append(found, "step", {"name": name, "status": status, "seconds": 1})
    for name in ("target sizes", "other gpu tests", "bench gated attention"):
        lines.append(found, "step", {"name": name, "status": "passed", "seconds": 1})
    part = steps(2, tiny=True, again=tmp_path)
    # what was cut, and what did not even begin
    assert [each.name for each in part[1:5]] == [
        "memory of the kernels",
        "small sizes",
        "bench gated unit",
        "bench gather",
    ]
    assert part[1].background and part[2].words[-2:] == ("--again", str(found))
    assert "--again" not in part[4].words and "--tiny" in part[4].words
    assert [each.name for each in steps(2)][:2] == ["facts", "bench scoring"]


def test_tests_that_passed_are_not_run_again(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import os\n\ndef test_a(): pass\n\ndef test_b(): assert 'MENDED' in os.environ\n\n"
        "def test_c(): pass\n"
    )
    found, again = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(*words: str, **variables: str) -> int:
        command = [word.format(found=found) for word in gpu_steps.TESTS]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        words = (*command, "-n", "1", *words, str(tmp_path / "test_one.py"))
        return subprocess.run(words, env=environment, cwd=tmp_path).returncode

    assert run("-k", "not c") == 1
    faults = [line for line in lines.read(found) if line["failed"]]
    assert len(lines.read(found)) == 2 and "MENDED" in faults[0]["fault"]
    # a test that was never reached is, besides the one that failed
    assert run("--lines", str(again), "--again", str(found), MENDED="1") == 0
    assert [line["test"] for line in lines.read(again)] == [
        "test_one.py::test_b",
        "test_one.py::test_c",
    ]
    assert run("--again", str(again), "-k", "b or c") == 5


def test_a_run_that_is_terminated_leaves_nothing_running(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--only", "bench gather"), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "== bench" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)
    process.terminate()
    said, _ = process.communicate()
    assert process.returncode == 130 and "stopped; what was found so far" in said
    files = Path("/proc").glob("[0-9]*/cmdline")
    assert not [path for path in files if str(tmp_path) in reading(path)]


def reading(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


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
    folders = (Path(folder) for folder in os.environ["PATH"].split(os.pathsep))
    programs = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    for path in programs:
        place = tmp_path / "path" / path.name
        if not path.name.startswith("git") and not place.is_symlink():
            place.symlink_to(path)
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
    assert content["failed"] == [] and content["tests_passed"] > 5
    for name in ("records", "scoring", "training", "memory", "stages"):
        assert content[name], name
    ops = {record["op"] for record in content["records"]}
    assert {"gated_attention", "gated_unit", "norm_score", "gather_all"} <= ops
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
            command(out, "--only", "facts", "bench gated unit", "bench gather"),
            env=bare,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds = moments.uniform(1, 45)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
        told = [line.partition(":")[0] for line in said.splitlines() if ": passed" in line]
        found = lines.read(out / "found.jsonl")
        kept = [line["name"] for line in found if line["kind"] == "step"]
        assert kept[: len(told)] == told, f"after {seconds:.1f} s"
        for path in out.glob("*.json"):
            json.loads(path.read_text())
        records = [line for line in found if line["kind"] == "record"]
        if "bench gated unit" in kept:
            assert len(records) >= 6
        kinds = {(line["op"], line["case"], line["form"]) for line in records}
        assert len(lines.combined(out)["records"]) == len(kinds)
        # a step of a run that was killed may go on for a while
        time.sleep(0.1)
