"""Runs what is not finished, the most telling first, and writes JSON, tables and the plot.

python -m bench.evidence [--work runs/evidence] [--jobs 1] [--table-only]

A run is a folder of WORK that stays: end the program when you like and call it again, or have it
end by itself after BUDGET_S seconds. Times are measured at last, when nothing else runs any more.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import study
from bench.evidence import page
from bench.evidence.arms import ARMS, RATIOS, SEEDS, SHARES, STUDENTS, Arm, dense_of

WORK = Path("runs/evidence")
DENSE = Arm("dense", "one-shot", lambda share: {})
# of a student's budget
SMALL = min(SHARES)


@dataclass(frozen=True)
class Task:
    """One run: an arm at a budget from the dense model of a seed."""

    table: str
    arm: Arm
    share: float
    seed: int

    def folder(self, work: Path) -> Path:
        """Where it runs."""
        name = self.arm.name.replace(",", "").replace(" ", "-")
        return work / self.table / f"{name}-{self.share}-{self.seed}"

    def needs(self) -> list[Task]:
        """What must be finished before."""
        if self.arm is DENSE:
            return []
        dense = [Task("dense", DENSE, 0.5, self.seed)]
        shapes = [arm for arm in ARMS if arm.name == self.arm.shape_of]
        return [*dense, *(Task(self.table, shape, self.share, self.seed) for shape in shapes)]


def tasks() -> Iterator[Task]:
    """All of them, the most telling first."""
    yield from (Task("dense", DENSE, 0.5, seed) for seed in SEEDS)
    for share in reversed(SHARES):
        yield from (Task("arms", arm, share, seed) for seed in SEEDS for arm in ARMS)
    for table, arms, share in (("students", STUDENTS, SMALL), ("ratios", RATIOS, 1.0)):
        yield from (Task(table, arm, share, seed) for seed in SEEDS for arm in arms)


def work_on(place: int, work: Path) -> float:
    """Does the run at that place among ``tasks``, on one thread; seconds of the processor."""
    import torch

    from vitprune_fast.config.yamlfile import from_plain
    from vitprune_fast.recipes.presets import preset
    from vitprune_fast.recipes.start import run

    torch.set_num_threads(1)
    # a process of its own makes the tasks itself: settings are functions, which do not travel
    task, started = [*tasks()][place], time.process_time()
    config = preset("digits", task.arm.recipe)
    needed = [each.folder(work) for each in task.needs()]
    if needed:
        config = from_plain(dense_of(needed[0] / "dense"), config)
    if len(needed) > 1:
        # the shape is the run's model, and the dense one teaches
        shape = {**dense_of(needed[1] / "model"), "teachers": {"names": [str(needed[0] / "dense")]}}
        config = from_plain(shape, config)
    own = {"out": str(task.folder(work)), "seed": task.seed, "latency_seconds": 0.01}
    config = from_plain({**task.arm.settings(task.share), **own}, config)
    run(config, recipe=task.arm.recipe, command=["python", "-m", "bench.evidence"])
    return time.process_time() - started


def is_done(task: Task, work: Path) -> bool:
    """Whether its page is there, which is drawn at the end."""
    return (task.folder(work) / "report.html").is_file()


def work_off(work: Path, jobs: int, until: float) -> bool:
    """Does what is not done, so many at a time; whether all of it is. What fails is left out."""
    places = {task: place for place, task in enumerate(tasks())}
    left = [task for task in places if not is_done(task, work)]
    running: dict[Future[float], Task] = {}
    failed = False
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while True:
            ready = [task for task in left if all(is_done(needed, work) for needed in task.needs())]
            while ready and len(running) < jobs and time.time() < until:
                task = ready.pop(0)
                left.remove(task)
                running[pool.submit(work_on, places[task], work)] = task
            if not running:
                return not left and not failed
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task, error = running.pop(future), future.exception()
                failed |= error is not None
                said = f"{future.result():.0f} s" if error is None else f"FAILED, {error!r}"
                print(f"{task.folder(work)}: {said}, {len(left)} left", flush=True)


def collected(work: Path) -> list[dict[str, Any]]:
    """A line for every finished run."""
    lines = []
    for task in (task for task in tasks() if is_done(task, work)):
        summary = json.loads((task.folder(work) / "summary.json").read_text())
        rows = {name: summary[name] for name in summary["models"]}
        figures = ("params", "macs", "top1", "file_bytes", "peak_memory_bytes", "depth")
        lines.append(
            {
                "table": task.table,
                "arm": task.arm.name,
                "share": task.share,
                "seed": task.seed,
                "ratios": summary["ratios"],
                "rows": {
                    name: {figure: row[figure] for figure in figures} for name, row in rows.items()
                },
            }
        )
    return lines


def timed(work: Path) -> list[dict[str, Any]]:
    """Latency of what the arms hand back for the first seed, beside the dense model, in turns."""
    import torch

    import vitprune_fast as vp
    from vitprune_fast.planning.latency import latencies

    torch.set_num_threads(1)
    lines = []
    for share in SHARES:
        arms = [Task("arms", arm, share, SEEDS[0]) for arm in ARMS]
        arms = [task for task in arms if is_done(task, work)]
        folders = {task.arm.name: page.handed_back(task.folder(work)) for task in arms}
        folders["dense"] = Task("dense", DENSE, 0.5, SEEDS[0]).folder(work) / "dense"
        models = [vp.load(folder) for folder in folders.values()]
        by_size = {
            size: latencies(models, batch_size=size, device="cpu", seconds=1.0) for size in (1, 64)
        }
        for place, name in enumerate(folders):
            ms = {f"batch{size}": 1e3 * found[place].median_s for size, found in by_size.items()}
            lines.append({"arm": name, "share": share, "ms": ms})
    return lines


def main() -> None:
    """Does what is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--table-only", action="store_true", help="from the committed JSON")
    options = parser.parse_args()
    if not options.table_only:
        until = time.time() + float(os.environ.get("BUDGET_S") or "inf")
        finished = work_off(options.work, options.jobs, until)
        times = {"latency": timed(options.work)} if finished else {}
        lines = collected(options.work)
        model = f"the dense models of the digits, seeds {SEEDS[0]} to {SEEDS[-1]}"
        study.write("evidence", model=model, complete=finished, lines=lines, **times)
    page.write()
