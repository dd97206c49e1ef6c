"""Everything that needs a GPU, in two parts that together take less than fifteen minutes.

python bench/run_gpu.py --out DIR --part 1|2 [--again DIR] [--only NAME ...] [--tiny]

Part 1 says what the machine is, judges the kernels, and times the most telling ones. Part 2, after
what failed was mended, runs that again with ``--again``, the folder of part 1, then all other
benches. Each step is a process of its own. It uses the interpreter that it is started with,
installs nothing and needs no git.

Whatever ends the run, DIR keeps what was found: ``facts.json``, ``found.jsonl`` (a line for each
step, test and measurement as it ends), ``results.json`` (all of it so far, after each step) and
``log.txt``. ``python bench/table.py --add DIR ...`` makes them a file of bench/results. With
``--tiny`` the same steps run on the smallest sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import lines  # noqa: E402

# what `make gpu-package` made, taken along by hand
PACKAGE = ROOT / "build" / "gpu"
BUDGET_S = {1: 280.0, 2: 380.0}
# tiny sizes on few busy cores take their time, and nothing there is lent by the second
PATIENCE = 10
# a step is not started with less than this left
LEAST_S = 5.0
MISSING = "not installed"
# a step ends with one of these by its exit status; pytest's 5 is that no test was there to run
STATUS = {0: "passed", 5: "nothing to run"}
GOOD = ("passed", "nothing to run", MISSING, "running beside")


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: what it is called, on the command line too.
        words: its command; ``{out}`` is the folder of the results, ``{found}`` their file of lines.
        limit_s: it is ended after so many seconds.
        beside: whether the next steps run at the same time; benches never do.
        alone: whether all that runs beside is ended first, because time is measured.
        environment: variables of its own.
    """

    name: str
    words: tuple[str, ...]
    limit_s: float
    beside: bool = False
    alone: bool = False
    environment: tuple[tuple[str, str], ...] = ()


PYTHON = (sys.executable,)
PYTEST = (*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib")
# every test that ends is a line; importlib: as pyproject.toml has it
TESTS = (*PYTEST, "-p", "bench.report_lines", "--lines", "{found}", "--timeout", "120")
BENCH = (*PYTEST, "-p", "no:xdist", "-s", "--timeout", "0", "-m", "gpu", "--lines", "{found}")
# every tensor has an allocation of its own then, whose ends are checked
OWN_MEMORY = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
WATCH = (
    *("compute-sanitizer", "--tool", "memcheck"),
    *("--report-api-errors", "no", "--error-exitcode", "1"),
)
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
)
# of single kernels, the settings of the GPU left alone
PROFILE = (
    *("ncu", "--clock-control", "none", "--csv", "--kernel-name", "regex:_kernel$|gather"),
    *("--metrics", ",".join(COUNTERS)),
)
PROFILED = ("attention_score", "gated_activation", "activation_score", "norm_score", "gather_all")
# those that do not need packages which such a machine may lack
GPU_FILES = (
    "tests/scoring/test_gpu.py",
    "tests/planning/test_latency.py",
    "tests/distill/test_teachers.py",
    "tests/distill/test_mixing.py",
)
# what Triton runs in every dtype, against fp64; not what only a compiler or a CPU runs
SMALL = "triton and not tiles_of_the_gpu and not fullgraph"
# the first three tell most: they run in part 1
FIRST = ("gated_attention", "activation_score", "gather")
STAGES = ("scoring", "distill_step", "masked_step", "prune")


def bench(name: str, limit_s: float, *words: str, title: str = "") -> Step:
    """The benches of one file."""
    title = title or f"bench {name.replace('_', ' ')}"
    return Step(title, (*BENCH, *words, f"bench/bench_{name}.py"), limit_s, alone=True)


def others() -> list[str]:
    """Files of benches of single ops that part 1 does not run."""
    found = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))
    marked = [name for name in found if "mark.gpu" in bench_file(name).read_text()]
    return [name for name in marked if name not in FIRST and name not in STAGES]


def bench_file(name: str) -> Path:
    """Where the benches of a name are."""
    return ROOT / "bench" / f"bench_{name}.py"


def steps(part: int, tiny: bool, again: Path | None = None) -> list[Step]:
    """All steps of a part, in the order of what they tell."""
    facts = Step("facts", (*PYTHON, "-m", "bench.gpu_facts", "{out}/facts.json"), 60)
    build = Step("native code", (*PYTHON, "setup.py", "build_ext", "--inplace"), 120)
    first = [facts] if has_native_code() else [facts, build]
    size = ("--tiny",) if tiny else ()
    cores = os.cpu_count() or 1
    many, few = (("-n", str(min(most, cores))) for most in (14, 4))
    if part == 1:
        small = ("-k", SMALL, "tests/ops")
        if tiny:
            # every op, of which the interpreter takes the smallest size alone
            small = ("-k", "same_in_every_form and even", "tests/ops/test_gpu_calls.py")
        return [
            *first,
            Step(
                "memory of the kernels",
                (*WATCH, *PYTHON, "-m", "bench.one_launch"),
                150,
                beside=True,
                environment=OWN_MEMORY,
            ),
            Step(
                "small sizes",
                (*TESTS, *many, "--maxschedchunk", "2", "-m", "not gpu and not slow", *small),
                95,
            ),
            Step("target sizes", (*TESTS, *few, "-m", "gpu", "tests/ops"), 40),
            Step("other gpu tests", (*TESTS, *few, "-m", "gpu", *GPU_FILES), 40),
            bench("gated_attention", 45, *size, "-k", "not 384 and not 0.25"),
            bench("activation_score", 30, *size),
            bench("gather", 30, *size),
        ]
    compiled = [f"bench/bench_{name}.py" for name in (*FIRST, *others()) if name != "gather"]
    if tiny:
        # a compiler takes its time at any size
        compiled = ["bench/bench_taylor_score.py"]
    candidates = PACKAGE / "candidates" / "variants.py"
    smoke = ("--smoke", "--smoke-dtype", "fp32", "--only", "c,d") if tiny else ()
    return [
        *first,
        *failed_before(again),
        bench("scoring", 90, *size),
        bench("distill_step", 60, *size),
        bench("masked_step", 25, *size),
        bench("prune", 30, *size),
        Step(
            "other benches",
            (*BENCH, *size, *(f"bench/bench_{name}.py" for name in others())),
            90,
            alone=True,
        ),
        Step(
            "candidates", (*PYTHON, str(candidates), "--out", "{out}", "--limit", "80", *smoke), 85
        ),
        bench("gated_attention", 20, *size, "-k", "384", title="bench longer attention"),
        Step("compiled peers", (*BENCH, *size, "--compiled", *compiled), 150, alone=True),
        Step(
            "counters",
            (*PROFILE, *PYTHON, "-m", "bench.one_launch", "--target", *PROFILED),
            40,
            alone=True,
        ),
        Step("compiled ops", (*TESTS, "-k", "triton and fullgraph", "tests/ops"), 60),
    ]


def failed_before(folder: Path | None) -> list[Step]:
    """What failed or was cut in the run that left a folder: its tests, then its other steps."""
    if folder is None:
        return []
    found = lines.read(folder / "found.jsonl")
    tests = [line["test"] for line in found if line["kind"] == "test" and line["failed"]]
    ended = {line["name"]: line["status"] for line in found if line["kind"] == "step"}
    known = steps(1, tiny=False)
    # a step whose failed tests are named runs these alone
    tested = ("small sizes", "target sizes", "other gpu tests")
    rest = [
        step
        for step in known
        if ended.get(step.name, "cut") not in GOOD
        and not (step.name in tested and ended.get(step.name) == "failed" and tests)
        and step.name not in ("facts", "native code")
    ]
    once = Step("tests that failed", (*TESTS, "-n", "4", *dict.fromkeys(tests)), 60)
    return [*([once] if tests else []), *(replace(step, beside=False) for step in rest)]


def has_native_code() -> bool:
    """Whether the op library is there; what was taken along is put in its place first."""
    for path in (PACKAGE / "native").glob("*.so"):
        place = ROOT / "vitprune_fast" / path.name
        if not place.exists():
            shutil.copy2(path, place)
    return any((ROOT / "vitprune_fast").glob("_C.*so"))


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
        self.beside: list[tuple[Step, subprocess.Popen, float]] = []

    def left_s(self) -> float:
        """Seconds until all must have ended."""
        return self.end - time.monotonic()

    def run(self, step: Step, log: IO[str]) -> str:
        """Run one step to its end or its limit; how it ended."""
        limit_s = min(step.limit_s, self.left_s())
        if step.alone:
            self.finish_beside()
        if shutil.which(step.words[0]) is None or not all(map(is_there, step.words[1:])):
            return self.note(step, MISSING, 0.0)
        if limit_s < LEAST_S:
            return self.note(step, "not started", 0.0)
        print(f"== {step.name} ({self.left_s():.0f} s left)", flush=True)
        print(f"\n== {step.name}", file=log, flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            [word.format(out=self.out, found=self.found) for word in step.words],
            cwd=ROOT,
            env={**os.environ, **variables(), **dict(step.environment)},
            stdout=log,
            stderr=subprocess.STDOUT,
            # so that all processes of a step can be ended; not a session: what ends this run from
            # outside ends them too
            preexec_fn=os.setpgrp,
        )
        if step.beside:
            self.beside.append((step, process, start))
            return "running beside"
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
        """Wait for what runs beside as long as its limit allows, then end it."""
        for step, process, start in self.beside:
            taken = time.monotonic() - start
            try:
                process.wait(max(0.0, min(step.limit_s - taken, self.left_s())))
                status = STATUS.get(process.returncode, "failed")
            except subprocess.TimeoutExpired:
                status = f"stopped after {taken:.0f} s"
            end(process)
            self.note(step, status, time.monotonic() - start)
        self.beside.clear()

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
    paths = [str(ROOT), str(PACKAGE / "packages"), os.environ.get("PYTHONPATH", "")]
    found = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if not sees_gpu():
        found["TRITON_INTERPRET"] = "1"
    return found


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
    """Leave nothing running beside, whatever happens."""
    try:
        yield
    finally:
        for _, process, _ in run.beside:
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
    for package in ("torch", "pytest", "xdist"):
        if importlib.util.find_spec(package) is None:
            print(f"make gpu: PYTHON must be one that has {package}, got {sys.executable}")
            return 2
    if not options.tiny and not sees_gpu():
        print("make gpu: torch must see a CUDA device, got none; --tiny runs on a CPU")
        return 2
    if options.again is not None and not (options.again / "found.jsonl").is_file():
        print(f"make gpu: --again must be the folder of a run, got {options.again}")
        return 2
    chosen = steps(options.part, options.tiny, options.again)
    if options.only:
        known = {step.name: step for part in (1, 2) for step in steps(part, options.tiny)}
        if unknown := [name for name in options.only if name not in known]:
            print(f"make gpu: --only must be among {', '.join(known)}, got {unknown[0]!r}")
            return 2
        chosen = [known[name] for name in options.only]
    if options.tiny:
        chosen = [replace(step, limit_s=PATIENCE * step.limit_s) for step in chosen]
    budget_s = options.budget or BUDGET_S[options.part] * (PATIENCE if options.tiny else 1)
    run = Run(options.out.resolve(), budget_s)
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
    return 0 if all(case["status"] in GOOD for case in ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
