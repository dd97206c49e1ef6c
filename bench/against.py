"""CPU time of the stages of this commit beside those of another one, in turns.

    python bench/against.py COMMIT

Ops can be registered once in a process, so each commit has a process of its own; they take turns at
every single call, with one thread each. A ratio is one of minima; its spread is that of the
quartiles of both. The native code of this tree serves both: build it for a commit that has another.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def cases() -> dict[str, Callable[[], Any]]:
    """Calls by public names, which commits far apart have."""
    import timm
    import torch

    import vitprune_fast as vp

    torch.manual_seed(0)
    torch.set_num_threads(1)
    base = timm.create_model("vit_base_patch16_224").eval()
    small = timm.create_model("vit_small_patch16_224").eval()
    structure = vp.describe(base)
    generator = torch.Generator().manual_seed(0)
    values = {
        axis.name: torch.rand(axis.size, generator=generator)
        for kind in ("head", "neuron")
        for axis in structure.units(kind)
    }
    scores, half = vp.Scores(values, "taylor", "square", 1), vp.Budget(macs=0.5)
    plan = vp.plan(structure, scores, half)
    images, labels = torch.randn(2, 3, 224, 224, generator=generator), torch.tensor([0, 1])
    own = vp.describe(small)
    plan_small = vp.Plan.of(
        own, {axis.name: range(axis.size // 2) for k in ("head", "neuron") for axis in own.units(k)}
    )
    optimizer = torch.optim.AdamW(base.parameters())
    for parameter in base.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    soft = vp.SoftCompaction(small, plan_small)

    def step() -> None:
        soft.refresh()(images).square().mean().backward()
        soft.scatter()

    return {
        "describe": lambda: vp.describe(base),
        "plan, MACs": lambda: vp.plan(structure, scores, half),
        "plan, parameters": lambda: vp.plan(structure, scores, vp.Budget(params=0.5)),
        "plan, uniform": lambda: vp.plan(structure, scores, half, allocation="uniform"),
        "predict_cost": lambda: vp.predict_cost(structure, plan),
        "score": lambda: vp.score(small, [(images, labels)]),
        "prune": lambda: vp.prune(base, plan),
        "prune with moments": lambda: vp.prune(base, plan, optimizer),
        "training step": step,
    }


def work() -> None:
    """Run the case whose name comes in, and print its CPU time in seconds."""
    calls = cases()
    print(*calls, sep="\t", flush=True)
    for line in sys.stdin:
        call = calls[line.rstrip("\n")]
        start = time.process_time()
        call()
        print(time.process_time() - start, flush=True)


@contextmanager
def worker(tree: Path) -> Iterator[Any]:
    """A process that runs the cases on the package of a tree."""
    paths = {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--work"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **paths}, cwd=tree, **pipes) as process:
        yield process
        process.communicate()


def ask(process: Any, case: str) -> float:
    """Seconds of CPU that one call takes in a worker."""
    process.stdin.write(f"{case}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(tree: Path, repetitions: int) -> None:
    """Print milliseconds and ratios of every case."""
    with worker(tree) as other, worker(ROOT) as ours:
        names, _ = (each.stdout.readline().rstrip("\n").split("\t") for each in (other, ours))
        print(f"{'case':20}{'before, ms':>12}{'now, ms':>12}{'now / before':>16}  spread")
        for name in names:
            pairs = [(ask(other, name), ask(ours, name)) for _ in range(repetitions + 1)][1:]
            before, now = map(sorted, zip(*pairs, strict=True))
            ratios = sorted(b / a for a, b in pairs)
            low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
            print(
                f"{name:20}{before[0] * 1e3:12.2f}{now[0] * 1e3:12.2f}{now[0] / before[0]:16.3f}"
                f"  {low:.3f} to {high:.3f}",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", nargs="?", help="what to compare with")
    parser.add_argument("--repetitions", type=int, default=10, help="calls of each (default: 10)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return 0
    if options.commit is None:
        parser.error("commit must be given, got none; the one before this is HEAD~1")
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*git, "add", "--detach", "-q", folder, options.commit], check=True)
        try:
            for library in (ROOT / "vitprune_fast").glob("*.so"):
                (Path(folder) / "vitprune_fast" / library.name).symlink_to(library)
            compare(Path(folder), options.repetitions)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
