"""Races between forms of one op: interleaved, checked equal first, written as JSON.

On a CPU: time of one thread on the processor, so that a busy machine does not count. On a GPU:
time between events on the stream. What is stated is the minimum; median and spread show the noise.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitprune_fast import __version__
from vitprune_fast.doctor import doctor

ROUNDS = 30
# one measurement repeats the call until it takes about this long
MEASUREMENT_S = 4e-3
HERE = Path(__file__).parent
RECORDS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json", type=Path, help="where results go (bench/results/<month>_<device>)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []


def device_name(device: str) -> str:
    """Name of the processor or GPU as part of a file name."""
    name = torch.cuda.get_device_name() if device == "cuda" else doctor().devices["cpu"]
    return re.sub(r"[^a-z0-9]+", "-", name.partition(",")[0].lower()).strip("-")


def commit() -> str:
    """Short name of the commit, marked when files other than the results differ from it."""

    def git(*words: str) -> str:
        result = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def write(config: pytest.Config, device: str) -> None:
    """Write all records so far; after every case, so an interrupted run keeps its results."""
    now = datetime.datetime.now(datetime.timezone.utc)
    path = config.getoption("--json") or (
        HERE / "results" / f"{now:%Y%m}_{device_name(device)}.json"
    )
    report = doctor()
    content = {
        "command": "python -m pytest " + shlex.join(config.invocation_params.args),
        "date": f"{now:%Y-%m-%d}",
        "commit": commit(),
        "device": report.devices["cuda:0" if device == "cuda" else "cpu"],
        "instructions": report.native.get("built with cpu_instructions", "unknown"),
        "versions": {**report.versions, "vitprune_fast": __version__},
        "system": platform.system(),
        # above the number of cores the caches were shared with others
        "load_average": round(os.getloadavg()[0], 1),
        "records": config.stash[RECORDS],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def measure(call: Callable, device: str, repeats: int) -> float:
    """Seconds of one call, from `repeats` of them."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


@pytest.fixture
def race(request: pytest.FixtureRequest):
    """Function that checks, times and records the forms of one op; the first is ours."""

    def run(op: str, case: str, forms: dict[str, Callable], *, device: str, bytes_moved: int):
        torch.set_num_threads(1)
        ours, *others = (call() for call in forms.values())
        for other in others:
            torch.testing.assert_close(other.to(ours.dtype), ours, rtol=1e-4, atol=1e-3)
        repeats = {}
        for name, call in forms.items():
            repeats[name] = max(1, int(MEASUREMENT_S / max(measure(call, device, 3), 1e-7)))
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(ROUNDS):
            for name, call in forms.items():
                times[name].append(measure(call, device, repeats[name]))
        best_of_ours = min(times[next(iter(forms))])
        for name, taken in times.items():
            best, median = min(taken), statistics.median(taken)
            record = {
                "op": op,
                "case": case,
                "form": name,
                "device": device,
                "min_us": round(best * 1e6, 2),
                "median_us": round(median * 1e6, 2),
                "spread": round(median / best - 1, 3),
                "rounds": ROUNDS,
                "gb_per_s": round(bytes_moved / best / 1e9, 1),
                "times_ours": round(best / best_of_ours, 2),
            }
            request.config.stash[RECORDS].append(record)
            print(f"{op} {case} {name}: {record['min_us']} us, {record['times_ours']} x ours")
        write(request.config, device)

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
