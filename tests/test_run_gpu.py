"""The runner of `make gpu`, on a machine that need not have a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import run_gpu

BODIES = {
    "passed": "pass",
    "failed": "assert False",
    "stopped by the budget": "import time; time.sleep(60)",
}


@pytest.mark.parametrize("status", [*BODIES, "nothing to run"])
def test_run_case_tells_how_it_ended(tmp_path, status):
    marker = "@pytest.mark.gpu" if status in BODIES else "@pytest.mark.other"
    body = BODIES.get(status, "pass")
    (tmp_path / "test_one.py").write_text(
        f"import pytest\n\n{marker}\ndef test_one():\n    {body}\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    limit_s = 4.0 if status == "stopped by the budget" else 60.0
    case = run_gpu.run_case([str(tmp_path / "test_one.py")], limit_s)
    assert case["status"] == status, case["output"]
    assert 0 < case["seconds"] < 30


def test_combined_keeps_every_case_and_all_records():
    cases = {
        "bench": {"status": "passed", "seconds": 1.0, "output": "", "records": [{"op": "a"}]},
        "tests": {"status": "not started"},
    }
    content = run_gpu.combined(cases, "a GPU", 60.0)
    assert content["records"] == [{"op": "a"}]
    assert {name: case["status"] for name, case in content["cases"].items()} == {
        "bench": "passed",
        "tests": "not started",
    }
    assert json.loads(json.dumps(content)) == content


def test_every_case_names_existing_files():
    for arguments in run_gpu.CASES.values():
        paths = [name.removeprefix("--ignore=") for name in arguments]
        assert all((run_gpu.ROOT / path).exists() for path in paths), arguments


def test_run_gpu_refuses_without_a_gpu_in_one_sentence():
    script = Path(run_gpu.__file__)
    command = "import torch, runpy, sys; torch.cuda.is_available = lambda: False;"
    command += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stdout == "make gpu: torch must see a CUDA device, got none\n"
