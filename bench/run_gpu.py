"""Everything that needs a GPU, within a time budget: `make gpu`.

Uses the interpreter it is started with and installs nothing. Each case runs in a process of its
own, those that judge the kernels before those that time them, and after each of them one JSON file
is written, so that whatever ends the run leaves the results so far. BUDGET_S (default 1200) is the
time for all.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
# a case is not started with less than this left
LEAST_S = 20.0
PYTEST = (sys.executable, "-m", "pytest", "-q")
# by the exit status of pytest; without a test marked gpu there is nothing to run
STATES = {0: "passed", 5: "nothing to run"}
MISSING = "not installed"
GOOD = (*STATES.values(), MISSING)
# the status of a run in which it found something, like that of a failed test
WATCH = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1")
FACTS = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def cases() -> dict[str, tuple[str, ...]]:
    """Name and command of each case, in the order of running."""
    benches = sorted(path.name for path in HERE.glob("bench_*.py"))
    return {
        # every form of Triton, also where the interpreter runs it elsewhere: against fp64, into
        # memory full of NaN; the same bits again; and what auto takes at the target size
        "kernels": (*PYTEST, "-k", "gpu or triton", "tests/ops"),
        "memory of the kernels": (*WATCH, sys.executable, "-m", "bench.one_launch"),
        "tests marked gpu, the rest": (*PYTEST, "-m", "gpu", "tests", "--ignore=tests/ops"),
        **{
            name.removesuffix(".py").replace("_", " ", 1): (*PYTEST, "-m", "gpu", f"bench/{name}")
            for name in benches
        },
    }


def run_case(command: Sequence[str], limit_s: float) -> dict:
    """Run one command; status, seconds, the end of the output, and the records of a bench."""
    if shutil.which(command[0]) is None:
        print(f"{command[0]} is {MISSING}", flush=True)
        return {"status": MISSING}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "bench.json"
        if command[-1].startswith("bench/"):
            command = [*command, "--json", str(results)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if command[0] == WATCH[0]:
            # every tensor has an allocation of its own then, whose ends are checked
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
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


def gpu_facts() -> str:
    """Driver, clocks and power limit of the GPU in one line; empty where nobody can say."""
    query = f"--query-gpu={','.join(FACTS)}"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader", "--id=0"]
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    pairs = zip(FACTS, values.strip().split(", "), strict=True)
    return ", ".join(f"{name} {value}" for name, value in pairs)


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
    facts = {"device": gpu, "gpu": gpu_facts(), "budget_s": budget_s}
    start = time.monotonic()
    now = datetime.datetime.now(datetime.timezone.utc)
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = HERE / "results" / f"{now:%Y%m}_{name}.json"
    done: dict[str, dict] = {}
    for name, command in cases().items():
        left = budget_s - (time.monotonic() - start)
        print(f"== {name} ({left:.0f} s left)", flush=True)
        done[name] = run_case(command, left) if left > LEAST_S else {"status": "not started"}
        path.write_text(json.dumps(combined(done, facts), indent=1) + "\n")
    if any(case.get("records") for case in done.values()):
        subprocess.run([sys.executable, str(HERE / "table.py")], check=True)
    for name, case in done.items():
        print(f"{case['status']:22} {case.get('seconds', 0):6.1f} s  {name}")
    return 0 if all(case["status"] in GOOD for case in done.values()) else 1


def combined(done: dict[str, dict], facts: dict) -> dict:
    """One results file of the same form as `make bench` writes, with the state of each case."""
    content: dict = {"command": "make gpu", **facts}
    states: dict[str, dict] = {}
    lists: dict[str, list] = {"records": [], "scoring": [], "memory": []}
    for name, case in done.items():
        for key, found in lists.items():
            found += case.get(key, [])
        states[name] = {key: case[key] for key in ("status", "seconds", "output") if key in case}
        for key in ("date", "commit", "versions"):
            if key in case:
                content[key] = case[key]
    return {**content, "cases": states, **lists}


if __name__ == "__main__":
    sys.exit(main())
