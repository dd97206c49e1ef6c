"""The runner of `make gpu`, on a machine that need not have a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import run_gpu

BODIES = {
    "passed": "pass",
    "failed": "assert False",
    "stopped by the budget": "import time; time.sleep(3600)",
}


@pytest.mark.parametrize("status", [*BODIES, "nothing to run"])
def test_run_case_tells_how_it_ended(tmp_path, status):
    marker = "@pytest.mark.gpu" if status in BODIES else "@pytest.mark.other"
    body = BODIES.get(status, "pass")
    (tmp_path / "test_one.py").write_text(
        f"import pytest\n\n{marker}\ndef test_one():\n    {body}\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    limit_s = 4.0 if status == "stopped by the budget" else 240.0
    command = (*run_gpu.PYTEST, "-m", "gpu", str(tmp_path / "test_one.py"))
    case = run_gpu.run_case(command, limit_s)
    assert case["status"] == status, case["output"]
    assert case["seconds"] > 0


def test_run_case_tells_what_is_not_installed(capsys):
    assert run_gpu.run_case(["no-such-program"], 240.0) == {"status": "not installed"}
    assert capsys.readouterr().out == "no-such-program is not installed\n"


def test_the_memory_watcher_gets_allocations_of_their_own(tmp_path, monkeypatch):
    watcher = tmp_path / "compute-sanitizer"
    watcher.write_text('#!/bin/sh\necho "caching $PYTORCH_NO_CUDA_MEMORY_CACHING" "$@"\nexit 1\n')
    watcher.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    case = run_gpu.run_case(run_gpu.cases()["memory of the kernels"], 240.0)
    assert case["status"] == "failed"
    assert case["output"].startswith("caching 1 --tool memcheck --error-exitcode 1")
    assert case["output"].endswith("-m bench.one_launch\n")


def test_combined_keeps_every_case_and_all_records():
    done = {
        "bench": {"status": "passed", "seconds": 1.0, "output": "", "records": [{"op": "a"}]},
        "tests": {"status": "not started"},
    }
    content = run_gpu.combined(done, {"device": "a GPU", "budget_s": 60.0})
    assert content["device"] == "a GPU"
    assert content["records"] == [{"op": "a"}]
    assert {name: case["status"] for name, case in content["cases"].items()} == {
        "bench": "passed",
        "tests": "not started",
    }
    assert json.loads(json.dumps(content)) == content


def test_every_case_names_existing_files_and_every_bench_has_one():
    commands = run_gpu.cases().values()
    paths = [
        word.removeprefix("--ignore=")
        for command in commands
        for word in command
        if word.removeprefix("--ignore=").startswith(("tests", "bench/"))
    ]
    assert all((run_gpu.ROOT / path).exists() for path in paths)
    benches = {f"bench/{path.name}" for path in run_gpu.HERE.glob("bench_*.py")}
    assert len(benches) >= 2 and benches <= set(paths)


def test_gpu_facts_are_empty_without_the_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_gpu.gpu_facts() == ""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'A GPU, 580.1, 1980 MHz, 3201 MHz, 700.00 W'\n")
    program.chmod(0o755)
    assert run_gpu.gpu_facts().startswith("name A GPU, driver_version 580.1, clocks.max.sm 1980")


def test_run_gpu_refuses_without_a_gpu_in_one_sentence():
    script = Path(run_gpu.__file__)
    command = "import torch, runpy, sys; torch.cuda.is_available = lambda: False;"
    command += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stdout == "make gpu: torch must see a CUDA device, got none\n"
