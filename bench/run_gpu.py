"""Everything that needs a GPU, in two parts that together take less than fifteen minutes.

python bench/run_gpu.py --out DIR --part 1|2 [--again DIR] [--only NAME ...] [--tiny]

Part 1 says what the machine is, judges the kernels, and times the most telling ones. Part 2, after
what failed was mended, runs that again (``--again``: the folder of part 1), then all other benches.
Each step is a process of its own. It uses the interpreter that it is started with, installs nothing
and needs no git.

Whatever ends the run, DIR keeps what was found: ``facts.json``, ``found.jsonl`` (a line for each
step, test and measurement as it ends), ``results.json`` (all of it so far, after each step) and
``log.txt``. ``python bench/table.py --add DIR ...`` makes them a file of bench/results. With
``--tiny`` the same steps run on the smallest sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import lines  # noqa: E402
from bench.gpu_steps import PACKAGE, Step, steps  # noqa: E402

BUDGET_S = {1: 280.0, 2: 380.0}
# tiny sizes on few busy cores take their time, and nothing there is lent by the second
PATIENCE = 10
# a step is not started with less than this left
LEAST_S = 5.0
# by the exit status; pytest's 5 is that no test was there to run
STATUS = {0: "passed", 5: "nothing to run"}
NEEDED = ("torch", "timm", "pytest", "xdist", "pytest_timeout", "hypothesis")


class Run:
    """The steps of one part, with what they leave in a folder.

    Args:
        out: the folder; made when it is not there.
        budget_s: seconds for all steps.
    """

    def __init__(self, out: Path, budget_s: float):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.found = out, out / "found.jsonl"
        self.end = time.monotonic() + budget_s
        self.background: list[tuple[Step, subprocess.Popen, float]] = []

    def left_s(self) -> float:
        """Seconds until all must have ended."""
        return self.end - time.monotonic()

    def run(self, step: Step, log: IO[str]) -> str:
        """Run one step to its end or its limit; how it ended."""
        limit_s = min(step.limit_s, self.left_s())
        if step.alone:
            self.finish_beside()
        environment = {**os.environ, **variables(), **dict(step.environment)}
        found = shutil.which(step.words[0], path=environment["PATH"])
        if found is None or not all(map(is_there, step.words[1:])):
            return self.note(step, lines.MISSING, 0.0)
        if limit_s < LEAST_S:
            return self.note(step, "not started", 0.0)
        print(f"== {step.name} ({self.left_s():.0f} s left)", flush=True)
        print(f"\n== {step.name}", file=log, flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            [found, *(word.format(out=self.out, found=self.found) for word in step.words[1:])],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=in_a_group,
        )
        if step.background:
            self.background.append((step, process, start))
            return "runs in the background"
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            end(process)
            return self.note(step, f"stopped after {limit_s:.0f} s", limit_s)
        except BaseException:
            end(process)
            raise
        status = STATUS.get(process.returncode, "failed")
        return self.note(step, status, time.monotonic() - start)

    def finish_beside(self) -> None:
        """End what runs in the background: it had the time of the steps meanwhile."""
        for step, process, start in self.background:
            status = process.poll()
            seconds = time.monotonic() - start
            end(process)
            cut = status is None
            told = f"stopped after {seconds:.0f} s" if cut else STATUS.get(status, "failed")
            self.note(step, told, seconds)
        self.background.clear()

    def note(self, step: Step, status: str, seconds: float) -> str:
        """Keep how a step ended, and with it all results so far."""
        finding = {"name": step.name, "status": status, "seconds": round(seconds, 1)}
        lines.append(self.found, "step", finding)
        lines.replace(self.out / "results.json", lines.combined(self.out))
        print(f"{step.name}: {status}", flush=True)
        return status


def is_there(word: str) -> bool:
    """Whether a file of the package of candidates is there, if it is one."""
    return not word.startswith(str(PACKAGE)) or Path(word).exists()


def variables() -> dict[str, str]:
    """What every step finds in its environment."""
    from vitprune_fast._toolkit import cuda_home

    def joined(*paths: object) -> str:
        return os.pathsep.join(str(path) for path in paths if path)

    home = cuda_home()
    found = {
        "PYTHONPATH": joined(ROOT, PACKAGE / "packages", os.environ.get("PYTHONPATH")),
        # the toolkit's programs that watch and profile
        "PATH": joined(os.environ.get("PATH"), home and home / "bin"),
        "PYTHONUNBUFFERED": "1",
    }
    return found if sees_gpu() else {**found, "TRITON_INTERPRET": "1"}


def in_a_group() -> None:
    """Have a step be ended with all its processes, and with this one.

    Not a session of its own: what ends this run from outside would pass it over.
    """
    os.setpgrp()
    kill_with_parent = 1
    ctypes.CDLL(None).prctl(kill_with_parent, signal.SIGKILL)


def place_native_code() -> bool:
    """Put what was taken along in its place, where nothing newer is; whether native code loads."""
    for path in (PACKAGE / "native").glob("*.so"):
        place = ROOT / "vitprune_fast" / path.name
        if not place.exists() or place.stat().st_mtime < path.stat().st_mtime:
            shutil.copy2(path, place)
    code = "from vitprune_fast._extension import OBSTACLE; raise SystemExit(OBSTACLE is not None)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def sees_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def end(process: subprocess.Popen) -> None:
    """End a process and those it started, whether it has ended already or not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def ending_children(run: Run) -> Iterator[None]:
    """Leave nothing running, whatever happens."""
    try:
        yield
    finally:
        for _, process, _ in run.background:
            end(process)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options, of the command line by default."""
    parser = argparse.ArgumentParser(
        "run_gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument("--part", type=int, choices=(1, 2), default=1)
    parser.add_argument("--again", type=Path, metavar="DIR", help="part 2: what failed there first")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="steps to run, and no other")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds, 280 or 380 by default")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, on a CPU too")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run the steps; 0 when all passed, 1 when not, 2 when nothing can run here."""
    options = parse(words)
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            print(f"make gpu: PYTHON must be one that has {package}, got {sys.executable}")
            return 2
    if not options.tiny and not sees_gpu():
        print("make gpu: torch must see a CUDA device, got none; --tiny runs on a CPU")
        return 2
    if options.again is not None and not (options.again / "found.jsonl").is_file():
        print(f"make gpu: --again must be the folder of a run, got {options.again}")
        return 2
    common = {"tiny": options.tiny, "native": place_native_code()}
    chosen = steps(options.part, **common, again=options.again)
    if options.only:
        known = {step.name: step for part in (1, 2) for step in steps(part, **common)}
        known |= {step.name: step for step in chosen}
        if unknown := [name for name in options.only if name not in known]:
            print(f"make gpu: --only must be among {', '.join(known)}, got {unknown[0]!r}")
            return 2
        chosen = [known[name] for name in options.only]
    if options.tiny:
        chosen = [replace(step, limit_s=PATIENCE * step.limit_s) for step in chosen]
    budget_s = BUDGET_S[options.part] * (PATIENCE if options.tiny else 1)
    run = Run(options.out.resolve(), budget_s if options.budget is None else options.budget)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (run.out / "log.txt").open("a") as log, ending_children(run):
            for step in chosen:
                run.run(step, log)
            run.finish_beside()
    except KeyboardInterrupt:
        print(f"make gpu: stopped; what was found so far is in {run.out}")
        return 130
    ended = lines.combined(run.out)["cases"]
    for name, case in ended.items():
        print(f"{case['status']:22} {case['seconds']:6.1f} s  {name}")
    return 0 if all(case["status"] in lines.GOOD for case in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
