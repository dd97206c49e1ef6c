"""Races between forms of one op: interleaved, checked equal first, written as JSON.

On a CPU: time of one thread on the processor, so that a busy machine does not count. On a GPU:
time between events on the stream. What is stated is the minimum; median and spread show the noise.
The limit is a plain copy that moves as many bytes, raced beside the forms in the same process.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
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
# races of whole scoring steps and of training steps, and the memory of one
SCORING = pytest.StashKey[list]()
TRAINING = pytest.StashKey[list]()
MEMORY = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json", type=Path, help="where results go (bench/results/<month>_<device>)")


def keep_freed_memory(up_to: int = 2**30) -> None:
    """Have glibc keep what was freed, as it does in the long run of a training.

    Else results of some megabytes are given back and asked for anew at every call, or not, by
    chance of what lies beside them, and page faults are what is measured.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, up_to)


def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()
    for key in (RECORDS, SCORING, TRAINING, MEMORY):
        config.stash[key] = []


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
        "scoring": config.stash[SCORING],
        "training": config.stash[TRAINING],
        "memory": config.stash[MEMORY],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def note_race(
    config: pytest.Config, case: str, device: str, entries: list[dict], kind: str = "scoring"
) -> None:
    """Record the race of whole ``scoring`` or ``training`` steps."""
    stash = {"scoring": SCORING, "training": TRAINING}[kind]
    config.stash[stash].append({"case": case, "device": device, "entries": entries})
    for entry in entries:
        print(f"{case} {entry['name']}: {entry['seconds'] * 1e3:.1f} ms")
    write(config, device)


def note_memory(config: pytest.Config, case: str, device: str, found: dict[str, int]) -> None:
    """Record bytes of peak memory, by what needed them."""
    config.stash[MEMORY].append({"case": case, "device": device, **found})
    print(case, found)
    write(config, device)


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


# how far forms may differ, as a share of the largest number: rounding of the shortest dtype among
# the results, and for fp32 of sums over a few thousand products
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(result: torch.Tensor | Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    """The tensors of a result that is one of them, or several with None for what is not made."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for tensor in result if tensor is not None]


def check_same(label: str, ours: list[torch.Tensor], others: list[torch.Tensor], exact: bool):
    """Fail, saying where, unless two forms have the same result."""
    if len(ours) != len(others):
        raise AssertionError(f"{label} must have {len(ours)} results like ours, got {len(others)}")
    tolerance = 0.0 if exact else max(TOLERANCES[our.dtype] for our in ours)
    for number, (our, other) in enumerate(zip(ours, others, strict=True)):
        if our.shape != other.shape:
            shapes = f"{tuple(our.shape)} like ours, got {tuple(other.shape)}"
            raise AssertionError(f"{label} must have result {number} of shape {shapes}")
        wanted, got = our.double(), other.double()
        limit = tolerance * wanted.abs().max().item()
        error = (got - wanted).abs().max().item()
        # also false for NaN
        if not error <= limit:
            raise AssertionError(
                f"{label} must have result {number} within {limit:.2e} of ours, got {error:.2e}"
            )


@pytest.fixture
def race(request: pytest.FixtureRequest):
    """Function that checks, times and records the forms of one op; the first is ours.

    With ``exact`` the results must be equal, else within the rounding of their dtype.
    """

    def run(
        op: str,
        case: str,
        forms: dict[str, Callable],
        *,
        device: str,
        bytes_moved: int,
        exact: bool = False,
        rounds: int = ROUNDS,
    ):
        torch.set_num_threads(1)
        ours, *others = (tensors(call()) for call in forms.values())
        for name, other in zip(list(forms)[1:], others, strict=True):
            check_same(f"{op}: form {name!r} of case {case!r}", ours, other, exact)
        del ours, others
        # read and written once each, like the bytes that the op has to move
        source = torch.zeros(bytes_moved // 2, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        calls = {**forms, None: lambda: target.copy_(source)}
        repeats = {}
        for name, call in calls.items():
            repeats[name] = max(1, int(MEASUREMENT_S / max(measure(call, device, 3), 1e-7)))
        times: dict[str | None, list[float]] = {name: [] for name in calls}
        order, shuffle = list(calls), random.Random(0).shuffle
        for _ in range(rounds):
            # whoever comes after a form that left the caches full of something else pays for it
            shuffle(order)
            for name in order:
                times[name].append(measure(calls[name], device, repeats[name]))
        limit = min(times.pop(None))
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
                "rounds": rounds,
                "gb_per_s": round(bytes_moved / best / 1e9, 1),
                "of_copy": round(limit / best, 3),
                "times_ours": round(best / best_of_ours, 2),
            }
            request.config.stash[RECORDS].append(record)
            print(f"{op} {case} {name}: {record['min_us']} us, {record['times_ours']} x ours")
        write(request.config, device)

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
