"""`vitprune-fast distill` with its default threads and with one, alone and next to busy loops.

python -m pytest bench/bench_threads.py -p no:xdist -s

Writes bench/results/<month>_threads.json. Every job is a process of its own, because the
environment decides how threads wait. The first line that it prints of its training starts the clock
and its end stops it: imports and opening the data do not count.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import study
from bench.conftest import HERE
from vitprune_fast.recipes.presets import DIGITS
from vitprune_fast.run.cores import available_cores

ROUNDS = 5
EPOCHS = 4
ONE, DEFAULT, SPINNING = "`--threads 1`", "default", "default, threads that spin"
# what GNU's OpenMP does by itself
FORMS = {ONE: ["--threads", "1"], DEFAULT: [], SPINNING: []}
ENVIRONMENTS = {SPINNING: {"GOMP_SPINCOUNT": "300000"}}


def command(out: Path) -> list[str]:
    """A student like that of `make prune`, untrained, learns from itself and the labels."""
    sizes = [f"{name}={value}" for name, value in DIGITS.model.args.items()]
    job = ["--model", DIGITS.model.name, "--model-args", *sizes, "num_classes=10"]
    job += ["--teacher", "self", "--data", "digits", "--batch-size", "32"]
    job += ["--epochs", str(EPOCHS), "--warmup-epochs", "0", "--log-steps", "1"]
    main = [sys.executable, "-u", "-m", "vitprune_fast.cli.main"]
    return [*main, "distill", *job, "--device", "cpu", "--out", str(out)]


def timed(form: str, out: Path) -> tuple[float, bytes]:
    """Seconds of training and saving, and what was saved."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    environ = {**ours, **ENVIRONMENTS.get(form, {}), "PYTHONPATH": str(HERE.parent)}
    words = [*command(out), *FORMS[form]]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        # a job that fails prints no such line
        start = next((time.perf_counter() for line in job.stdout if " epoch 1 " in line), None)
        job.stdout.read()
        status = job.wait()
        end = time.perf_counter()
    assert status == 0 and start is not None, words
    return end - start, (out / "model.safetensors").read_bytes()


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """Processes that do nothing but compute, while the body runs."""
    spin = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(spin) for _ in range(loops)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("only_timed")
@pytest.mark.timeout(7200)
def bench_threads(tmp_path: Path) -> None:
    cores = available_cores()
    # of others: ours come later
    load_average = round(os.getloadavg()[0], 1)
    loads = {"nothing": 0, f"{cores} busy loops": cores}
    saved: dict[str, bytes] = {}
    times: dict[tuple[str, str], list[float]] = {}
    order, shuffle = list(FORMS), random.Random(0).shuffle
    for number in range(ROUNDS):
        for load, loops in loads.items():
            shuffle(order)
            for form in order:
                with busy(loops):
                    seconds, weights = timed(form, tmp_path / f"{number} {loops} {form}")
                # neither load nor waiting may change a bit; the number of threads may
                own = ONE if form == ONE else DEFAULT
                assert saved.setdefault(own, weights) == weights, (form, load)
                times.setdefault((load, form), []).append(seconds)
                print(f"with {load}, {form}: {seconds:.2f} s", flush=True)
    rows = []
    for load, form in itertools.product(loads, FORMS):
        taken = times[load, form]
        ratios = [a / b for a, b in zip(taken, times[load, ONE], strict=True)]
        rows.append(
            {
                "beside": load,
                "form": form,
                "median_s": round(statistics.median(taken), 2),
                "min_s": round(min(taken), 2),
                # each of its own round
                "times_one": round(statistics.median(ratios), 2),
                "least": round(min(ratios), 2),
                "most": round(max(ratios), 2),
            }
        )
    study.write(
        "threads",
        command="python -m pytest bench/bench_threads.py -p no:xdist -s",
        model="an untrained student of the digits preset",
        cores=cores,
        load_average=load_average,
        rounds=ROUNDS,
        threads=rows,
    )
