"""What compensation keeps of a real trained model, without any training afterwards.

python -m bench.compensation [FOLDER]   FOLDER holds the dense model of a digits run
                                        (runs/digits/dense)

The units are chosen and the projections fitted on the training images; top-1 is that of the test
images. Writes bench/results/<month>_compensation.json.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from statistics import median

import torch

import vitprune_fast as vp
from bench.conftest import commit
from vitprune_fast.data import Loader
from vitprune_fast.recipes.profile import versions

RESULTS = Path(__file__).parent / "results"
SHARES = (0.8, 0.7, 0.6, 0.5, 0.4)


def main(folder: str = "runs/digits/dense") -> None:
    """Prune the model to every budget, as it is and compensated."""
    torch.set_num_threads(1)
    model = vp.load(folder).eval()
    size = vp.describe(model).input_size
    data = vp.open_data("digits", image_size=size[1:], channels=size[0])

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
    now = datetime.datetime.now(datetime.timezone.utc)
    content = {
        "command": "python -m bench.compensation",
        "date": f"{now:%Y-%m-%d}",
        "commit": commit(),
        "versions": versions(),
        "model": "the dense model of `make prune` (digits, seed 0)",
        "tokens": calibration.tokens,
        "dense": top1(model),
        "compensation": rows,
    }
    path = RESULTS / f"{now:%Y%m}_compensation.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
