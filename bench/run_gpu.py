"""Everything that needs a GPU, within a time budget: `make gpu`.

Uses the interpreter it is started with and installs nothing. Each case runs in a process of its
own, newest cases first, and after each of them one JSON file is written, so that whatever ends the
run leaves the results so far. BUDGET_S (default 1200) is the time for all.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
# a case is not started with less than this left
LEAST_S = 20.0
# by the exit status of pytest; without a test marked gpu there is nothing to run
STATES = {0: "passed", 5: "nothing to run"}
GOOD = tuple(STATES.values())
# newest first
CASES = {
    "bench taylor_score": ["bench/bench_taylor_score.py"],
    "tests of ops": ["tests/ops"],
    "tests marked gpu, the rest": ["tests", "--ignore=tests/ops"],
}


def run_case(arguments: list[str], limit_s: float) -> dict:
    """Run the GPU part of some test files; status, seconds, the end of the output, records."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *arguments]
        if arguments[0].startswith("bench"):
            command += ["--json", str(results)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
            )
            status = STATES.get(done.returncode, "failed")
            output = done.stdout.decode(errors="replace")
        except subprocess.TimeoutExpired as error:
            status = "stopped by the budget"
            output = (error.stdout or b"").decode(errors="replace")
        found = json.loads(results.read_text()) if results.is_file() else {}
    print(output[-2000:], flush=True)
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "output": output[-4000:],
        **found,
    }


def main() -> int:
    """Run the cases; 0 when all passed, 1 when not, 2 when nothing can run here."""
    for package in ("torch", "pytest"):
        if importlib.util.find_spec(package) is None:
            print(f"make gpu: PYTHON must be one that has {package}, got {sys.executable}")
            return 2
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch must see a CUDA device, got none")
        return 2
    gpu = torch.cuda.get_device_name()
    budget_s = float(os.environ.get("BUDGET_S", "1200"))
    start = time.monotonic()
    now = datetime.datetime.now(datetime.timezone.utc)
    path = HERE / "results" / f"{now:%Y%m}_{gpu.lower().replace(' ', '-')}.json"
    cases: dict[str, dict] = {}
    for name, arguments in CASES.items():
        left = budget_s - (time.monotonic() - start)
        print(f"== {name} ({left:.0f} s left)", flush=True)
        cases[name] = run_case(arguments, left) if left > LEAST_S else {"status": "not started"}
        path.write_text(json.dumps(combined(cases, gpu, budget_s), indent=1) + "\n")
    for name, case in cases.items():
        print(f"{case['status']:22} {case.get('seconds', 0):6.1f} s  {name}")
    return 0 if all(case["status"] in GOOD for case in cases.values()) else 1


def combined(cases: dict[str, dict], gpu: str, budget_s: float) -> dict:
    """One results file of the same form as `make bench` writes, with the state of each case."""
    facts: dict = {"command": "make gpu", "device": gpu, "budget_s": budget_s}
    records, states = [], {}
    for name, case in cases.items():
        records += case.get("records", [])
        states[name] = {key: case[key] for key in ("status", "seconds", "output") if key in case}
        for key in ("date", "commit", "versions"):
            if key in case:
                facts[key] = case[key]
    return {**facts, "cases": states, "records": records}


if __name__ == "__main__":
    sys.exit(main())
