"""What a sweep costs, in dense forward passes over its images.

python -m bench.sweep [ROUNDS]

A ViT-S with random weights, cut to half of its MACs, and 1,024 images of noise: at 84 px, where
few tokens share the costs of a fit, and at 224 px. In turns with the dense model's own forward pass
and the pruned model's; processor time of one thread. Writes bench/results/<yyyymm>_sweep.json.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import timm
import torch

import vitprune_fast as vp
from bench import study
from vitprune_fast.benches.harness import keep_freed_memory
from vitprune_fast.testing import randomise

CASES = {
    "ViT-S/14 at 84 px": ("vit_small_patch14_dinov2", 84),
    "ViT-S/16 at 224 px": ("vit_small_patch16_224", 224),
}
IMAGES, BATCH, MACS = 1024, 64, 0.5


def raced(name: str, pixels: int, rounds: int) -> dict[str, float]:
    """Least seconds of the three, over the rounds."""
    model = timm.create_model(name, img_size=pixels, num_classes=100).eval()
    randomise(model, 0)
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, pixels, pixels, generator=draws)
    scores = vp.score(model, None, criterion="magnitude")
    plan = vp.plan(model, scores, vp.Budget(macs=MACS))
    pruned = vp.prune(model, plan)

    @torch.no_grad()
    def forward(model: torch.nn.Module) -> None:
        for batch in images.split(BATCH):
            model(batch)

    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: forward(model),
        "pruned": lambda: forward(pruned),
        "sweep": lambda: vp.prune(model, plan, calibration=images),
    }
    times: dict[str, float] = {}
    for _ in range(rounds):
        for each, call in calls.items():
            start = time.thread_time()
            call()
            seconds = time.thread_time() - start
            times[each] = round(min(seconds, times.get(each, seconds)), 2)
        print(name, times, flush=True)
    return times


def main(rounds: str = "3") -> None:
    """Time all cases."""
    torch.set_num_threads(1)
    keep_freed_memory()
    # noise has other statistics than photographs
    warnings.filterwarnings("ignore", "prune: calibration should be normalised")
    rows = []
    for case, (name, pixels) in CASES.items():
        times = raced(name, pixels, int(rounds))
        passes = round(times["sweep"] / times["dense"], 2)
        rows.append({"case": case, "seconds": times, "passes": passes})
    about = "random weights, half of the MACs"
    study.write("sweep", model=about, images=IMAGES, rounds=int(rounds), sweeps=rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
