"""CPU time of the steps of this commit and of another one, in turns.

    python bench/against.py COMMIT

Ops can be registered once in a process, so each commit has a process of its own; they take turns at
every single call, with one thread each. Which of two processes starts first can decide by a factor
of two, so they swap in the next round. A ratio is one of minima over all rounds, and the ratio of
each round stands next to it. A commit whose native code is another gets its own, built for the CPU.
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
    import numpy as np
    import timm
    import torch

    import vitprune_fast as vp
    from vitprune_fast import ops

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
    # what is unset differs between commits
    plan = vp.plan(structure, scores, half, round_to=1)
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
    weight = base.get_parameter("blocks.0.mlp.fc1.weight").detach()
    rows = ops.GatherTable([ops.Selection((3072, 768), np.arange(0, 3072, 2))])

    x, grad = torch.randn(2, 4, 197, 768, generator=generator)
    weight_C, bias_C = torch.randn(2, 768, generator=generator)
    qkv = torch.randn(2, 197, 3, 12, 64, generator=generator, requires_grad=True)
    head_grad = torch.randn(2, 197, 768, generator=generator)
    probe, gate = torch.zeros(2, 12, requires_grad=True), torch.ones(12, requires_grad=True)

    def attention(out: torch.Tensor, leaf: torch.Tensor) -> None:
        torch.autograd.grad(out, (qkv, leaf), head_grad.view_as(out))

    def step() -> None:
        soft.refresh()(images).square().mean().backward()
        soft.scatter()

    return {
        "describe": lambda: vp.describe(base),
        "plan, MACs": lambda: vp.plan(structure, scores, half, round_to=1),
        "plan, parameters": lambda: vp.plan(structure, scores, vp.Budget(params=0.5), round_to=1),
        "plan, uniform": lambda: vp.plan(structure, scores, half, "uniform", round_to=1),
        "predict_cost": lambda: vp.predict_cost(structure, plan),
        "score": lambda: vp.score(small, [(images, labels)]),
        "gather": lambda: ops.gather_all([weight], rows),
        "taylor_score": lambda: ops.taylor_score(x, grad),
        "norm_score": lambda: ops.norm_score(x, grad, weight_C, bias_C, 1e-6),
        "scored_attention": lambda: attention(ops.scored_attention(qkv, probe), probe),
        "gated_attention": lambda: attention(ops.gated_attention(qkv, gate), gate),
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


def give_native_code(tree: Path, commit: str) -> None:
    """That of this tree where its sources are those of the commit, else it is built."""
    same = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", "csrc", "setup.py"]
    if subprocess.run(same).returncode:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, env={**os.environ, "VITPRUNE_WITH_CUDA": "0"}, check=True)
        return
    for library in (ROOT / "vitprune_fast").glob("*.so"):
        (tree / "vitprune_fast" / library.name).symlink_to(library)


def compare(tree: Path, rounds: int, repetitions: int) -> None:
    """Print milliseconds and ratios of every case."""
    least: dict[str, list[tuple[float, float]]] = {}
    for order in range(rounds):
        # memory that the first process of a pair got may not be had by the second, so they swap
        trees = (tree, ROOT) if order % 2 == 0 else (ROOT, tree)
        with worker(trees[0]) as first, worker(trees[1]) as second:
            other, ours = (first, second) if order % 2 == 0 else (second, first)
            names, _ = (each.stdout.readline().rstrip("\n").split("\t") for each in (other, ours))
            for name in names:
                pairs = [(ask(other, name), ask(ours, name)) for _ in range(repetitions + 1)][1:]
                before, now = map(min, zip(*pairs, strict=True))
                least.setdefault(name, []).append((before, now))
    print(f"{'case':20}{'before, ms':>12}{'now, ms':>12}{'now / before':>16}  rounds")
    for name, found in least.items():
        before, now = map(min, zip(*found, strict=True))
        each = "  ".join(f"{b / a:.3f}" for a, b in found)
        print(f"{name:20}{before * 1e3:12.2f}{now * 1e3:12.2f}{now / before:16.3f}  {each}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", nargs="?", help="what to compare with")
    parser.add_argument("--rounds", type=int, default=4, help="pairs of processes (default: 4)")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="calls of each in a round (default: 5)"
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return 0
    for name in ("rounds", "repetitions"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(options, name)}")
    if options.commit is None:
        parser.error("commit must be given, got none; the one before this is HEAD~1")
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*git, "add", "--detach", "-q", folder, options.commit], check=True)
        try:
            give_native_code(Path(folder), options.commit)
            compare(Path(folder), options.rounds, options.repetitions)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
