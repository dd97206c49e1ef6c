"""What a sweep costs, in dense forward passes over its images.

python -m bench.sweep [ROUNDS]

A ViT-S/14 at 84 px with random weights, cut to half of its MACs, 1,024 images of noise, in turns
with the dense model's own forward pass; processor time of one thread. Writes
bench/results/<yyyymm>_sweep.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import timm
import torch

import vitprune_fast as vp
from bench import study
from bench.conftest import keep_freed_memory
from vitprune_fast.doctor import doctor
from vitprune_fast.testing import randomise

IMAGES, BATCH = 1024, 64


def main(rounds: str = "3") -> None:
    """Time both in turns."""
    torch.set_num_threads(1)
    keep_freed_memory()
    model = timm.create_model("vit_small_patch14_dinov2", img_size=84, num_classes=100).eval()
    randomise(model, 0)
    images = torch.randn(IMAGES, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    scores = vp.score(model, None, criterion="magnitude")
    plan = vp.plan(model, scores, vp.Budget(macs=0.5))

    @torch.no_grad()
    def forward() -> None:
        for batch in images.split(BATCH):
            model(batch)

    def seconds(run: Callable[[], object]) -> float:
        start = time.thread_time()
        run()
        return time.thread_time() - start

    rows = []
    for _ in range(int(rounds)):
        passed = seconds(forward)
        swept = seconds(lambda: vp.prune(model, plan, calibration=images))
        rows.append({"forward_s": round(passed, 2), "sweep_s": round(swept, 2)})
        print(rows[-1], flush=True)
    best = [min(row[name] for row in rows) for name in ("forward_s", "sweep_s")]
    study.write(
        "sweep",
        model="ViT-S/14 at 84 px, random weights, half of the MACs",
        device=doctor().devices["cpu"].partition(",")[0],
        images=IMAGES,
        times_forward=round(best[1] / best[0], 2),
        rounds=rows,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
