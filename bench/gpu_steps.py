"""The steps of `make gpu`: what runs in each part, in the order of what it tells."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench import lines

ROOT = Path(__file__).resolve().parent.parent
# what `make gpu-package` made, taken along by hand
PACKAGE = ROOT / "build" / "gpu"


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: what it is called, on the command line too.
        words: its command; ``{out}`` is the folder of the results, ``{found}`` their file of lines.
        limit_s: it is ended after so many seconds.
        background: whether the next steps run at the same time; benches never do.
        alone: whether all that runs in the background is ended first, because time is measured.
        environment: variables of its own.
    """

    name: str
    words: tuple[str, ...]
    limit_s: float
    background: bool = False
    alone: bool = False
    environment: tuple[tuple[str, str], ...] = ()


PYTHON = (sys.executable,)
PYTEST = (*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib")
# every test that ends is a line; importlib: as pyproject.toml has it
TESTS = (*PYTEST, "-p", "bench.report_lines", "--lines", "{found}", "--timeout", "120")
BENCH = (*PYTEST, "-p", "no:xdist", "-s", "--timeout", "0", "-m", "gpu", "--lines", "{found}")
WATCH = (
    *("compute-sanitizer", "--tool", "memcheck"),
    *("--report-api-errors", "no", "--error-exitcode", "1"),
)
# every tensor has an allocation of its own then, whose ends are checked
OWN_MEMORY = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
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
PROFILED = ("attention_score", "gated_unit", "norm_score", "gather_all")
# those that do not need packages which such a machine may lack
GPU_FILES = (
    "tests/test_transfer.py",
    "tests/scoring/test_gpu.py",
    "tests/planning/test_latency.py",
    "tests/planning/test_memory.py",
    "tests/distill/test_teachers.py",
    "tests/distill/test_mixing.py",
)
# what Triton runs in every dtype, against fp64; not what only a compiler or a CPU runs
SMALL = "triton and not tiles_of_the_gpu and not fullgraph"
# benches of ops: the first three tell most and run in part 1, the others by what is in doubt
FIRST = ("gated_attention", "gated_unit", "gather")
OTHERS = (
    *("norm_score", "taylor_score", "attention_score"),
    *("manifold_loss", "kd_cross_entropy"),
)
# of whole steps
STEPS = ("scoring", "distill_step")


def bench_files(*names: str) -> tuple[str, ...]:
    """Where the benches of these names are."""
    return tuple(f"bench/bench_{name}.py" for name in names)


def bench(name: str, limit_s: float, *words: str, title: str = "") -> Step:
    """The benches of one file."""
    title = title or f"bench {name.replace('_', ' ')}"
    return Step(title, (*BENCH, *words, *bench_files(name)), limit_s, alone=True)


def steps(
    part: int, *, tiny: bool = False, native: bool = True, again: Path | None = None
) -> list[Step]:
    """All steps of a part.

    Args:
        part: 1 or 2.
        tiny: with the smallest sizes.
        native: whether native code is there; else it is built.
        again: the folder of a run whose faults part 2 looks at first.
    """
    facts = Step("facts", (*PYTHON, "-m", "bench.gpu_facts", "{out}/facts.json"), 60)
    first = [facts]
    if not native:
        build = Step("native code", (*PYTHON, "setup.py", "build_ext", "--inplace"), 120)
        first += [build, replace(facts, name="facts, native code built")]
    if part == 1:
        return [*first, *_judged(tiny), *_most_telling(tiny)]
    return [*first, *_not_good(again, tiny), *_rest(tiny)]


def _judged(tiny: bool) -> list[Step]:
    """Tests, and memory watched meanwhile."""
    cores = os.cpu_count() or 1
    many, few = (("-n", str(min(most, cores))) for most in (14, 4))
    small, tests = SMALL, "tests/ops"
    if tiny:
        # the quick suite has them all, in the interpreter
        small, tests = "same_in_every_form and even and score", "tests/ops/test_gpu_calls.py"
    watched = (*WATCH, *PYTHON, "-m", "bench.one_launch")
    # few tests at a time go to a process: they differ in how long they take
    at_once = (*many, "--maxschedchunk", "2", "-m", "not gpu and not slow")
    return [
        Step("memory of the kernels", watched, 180, background=True, environment=OWN_MEMORY),
        Step("small sizes", (*TESTS, *at_once, "-k", small, tests), 95),
        Step("target sizes", (*TESTS, *many, "-m", "gpu", tests), 60),
        Step("other gpu tests", (*TESTS, *few, "-m", "gpu", *GPU_FILES), 45),
    ]


def _most_telling(tiny: bool) -> list[Step]:
    """The benches that part 1 has time for."""
    size = ("--tiny",) if tiny else ()
    return [
        bench("gated_attention", 45, *size, "-k", "not 384 and not 0.25"),
        bench("gated_unit", 35, *size),
        bench("gather", 30, *size),
    ]


def _rest(tiny: bool) -> list[Step]:
    """What users call, all other ops, candidates for kernels, and compiled forms last."""
    size, ops = ("--tiny",) if tiny else (), bench_files(*OTHERS)
    candidates = (*PYTHON, str(PACKAGE / "candidates" / "variants.py"), "--out", "{out}")
    smoke = ("--smoke", "--smoke-dtype", "fp32", "--only", "d") if tiny else ()
    compiled = bench_files("gated_attention", "gated_unit", *OTHERS)
    tests = "tests/ops"
    if tiny:
        # a compiler takes its time at any size
        compiled, tests = bench_files("taylor_score"), "tests/ops/test_taylor_score.py"
    found = [
        bench("scoring", 90, *size),
        bench("distill_step", 60, *size),
        bench("masked_step", 25, *size),
        bench("prune", 60, *size),
        Step("other benches", (*BENCH, *size, *ops), 60, alone=True),
        Step("candidates", (*candidates, "--limit", "80", *smoke), 85, alone=True),
        bench("gated_attention", 20, *size, "-k", "384", title="bench longer attention"),
        Step(
            "counters",
            (*PROFILE, *PYTHON, "-m", "bench.one_launch", "--target", *PROFILED),
            40,
            alone=True,
        ),
        Step("compiled peers", (*BENCH, *size, "--compiled", *compiled), 120, alone=True),
        Step("compiled ops", (*TESTS, "-k", "triton and fullgraph", tests), 60),
    ]
    if not tiny:
        whole = (*BENCH, "--compiled", *bench_files(*STEPS))
        found.append(Step("compiled steps", whole, 180, alone=True))
    return found


def _not_good(folder: Path | None, tiny: bool) -> list[Step]:
    """The steps of part 1 that failed or were cut in the run that left a folder.

    Of their tests, those that passed there are left out.
    """
    if folder is None:
        return []
    ended = lines.combined(folder)["cases"]
    found = folder.resolve() / "found.jsonl"
    return [
        replace(step, words=(*step.words, "--again", str(found)))
        if step.words[: len(TESTS)] == TESTS
        else step
        for step in [*_judged(tiny), *_most_telling(tiny)]
        if ended.get(step.name, {}).get("status") not in lines.GOOD
    ]
