"""What the sweep keeps of a real trained model, without any training afterwards.

python -m bench.compensation [FOLDER]   FOLDER holds the dense model of a digits run
                                        (runs/digits/dense)

The units are chosen and the maps fitted on the training images; top-1 is that of the test images.
 Writes bench/results/<month>_compensation.json.
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
    """Prune the model to every budget, as it is and swept."""
    model, data = study.opened(folder)

    def batches(split: str) -> Loader:
        return Loader(data.split(split), 256, shuffle=False)

    def top1(one: torch.nn.Module) -> float:
        return round(vp.evaluate(one, batches("test")).top1, 4)

    scores, rows, tokens = vp.score(model, batches("train")), [], 0
    for share in SHARES:
        plan = vp.plan(model, scores, budget=vp.Budget(macs=share))
        small, report = vp.prune(model, plan, calibration=batches("train"), report=True)
        row: dict = {"macs": share, "cut": top1(vp.prune(model, plan)), "swept": top1(small)}
        writers = [fit for fit in report.fits if fit.part == "writer"]
        row["before"], row["after"] = (
            round(median(getattr(each, name) for each in writers), 3)
            for name in ("before", "after")
        )
        rows.append(row)
        tokens = report.tokens
        print(row, flush=True)
    study.write("compensation", tokens=tokens, dense=top1(model), compensation=rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
