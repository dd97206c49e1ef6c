"""What compensation keeps of a real trained model, without any training afterwards.

python -m bench.compensation [FOLDER]   FOLDER holds the dense model of a digits run
                                        (runs/digits/dense)

The units are chosen and the projections fitted on the training images; top-1 is that of the test
images. Writes bench/results/<month>_compensation.json.
"""

from __future__ import annotations

import sys
from statistics import median

import torch

import vitprune_fast as vp
from bench import study
from vitprune_fast.data import Loader

SHARES = (0.8, 0.7, 0.6, 0.5, 0.4)


def main(folder: str = "runs/digits/dense") -> None:
    """Prune the model to every budget, as it is and compensated."""
    model, data = study.opened(folder)

    def batches(split: str) -> Loader:
        return Loader(data.split(split), 256, shuffle=False)

    def top1(one: torch.nn.Module) -> float:
        return round(vp.evaluate(one, batches("test")).top1, 4)

    scores, calibration = vp.score(model, batches("train")), vp.calibrate(model, batches("train"))
    rows = []
    for share in SHARES:
        plan = vp.plan(model, scores, budget=vp.Budget(macs=share))
        row: dict = {"macs": share, "cut": top1(vp.prune(model, plan))}
        for how in ("mean", "least_squares"):
            with vp.compensate(model, plan, calibration, how) as report:
                row[how] = top1(vp.prune(model, plan))
        row["lost"], row["left"] = (
            round(median(getattr(each, name) for each in report), 3) for name in ("lost", "left")
        )
        rows.append(row)
        print(row, flush=True)
    study.write("compensation", tokens=calibration.tokens, dense=top1(model), compensation=rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
