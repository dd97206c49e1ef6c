"""How well each criterion ranks units, against leaving every unit out in turn, on a trained model.

python -m bench.criteria [FOLDER]   FOLDER holds the dense model of a digits run (runs/digits/dense)

Writes bench/results/<yyyymm>_criteria.json, from which `python bench/table.py` makes the table. The
images are training images; the ranks are Spearman's, inside each axis, averaged over the axes.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import vitprune_fast as vp
from bench.conftest import commit
from vitprune_fast.data import Loader
from vitprune_fast.recipes.profile import versions
from vitprune_fast.scoring.taylor import PER_TOKEN_KINDS

RESULTS = Path(__file__).parent / "results"
IMAGES = 256
KINDS = ("head", "neuron", "v_dim", "qk_dim", "embed", "attn_branch", "mlp_branch", "block")
CRITERIA = (
    ("taylor", "abs"),
    ("taylor", "square"),
    ("taylor", "signed"),
    ("taylor", "token_abs"),
    ("fisher", "square"),
    ("activation", "mean"),
    ("magnitude", "group"),
    ("magnitude", "l2"),
    ("magnitude", "l1"),
)


def agreement(model, scores: vp.Scores, truth: vp.Scores, kind: str) -> float:
    """Mean over the axes of a kind of the rank correlation with the truth."""
    ranks = []
    for axis in vp.describe(model).units(kind):
        if axis.name in scores:
            found = spearmanr(scores.ranking(axis.name), truth.ranking(axis.name))
            ranks.append(found.statistic)  # pyright: ignore[reportAttributeAccessIssue]
    return float(sum(ranks) / len(ranks))


def main(folder: str = "runs/digits/dense") -> None:
    """Score the model in every way, and compare."""
    torch.set_num_threads(1)
    model = vp.load(folder).eval()
    size = vp.describe(model).input_size
    data = vp.open_data("digits", image_size=size[1:], channels=size[0])
    loader = Loader(data.split("train"), IMAGES, shuffle=True)
    images, labels, _ = next(iter(loader))
    batches = [(images, labels)]
    truths, seconds = {}, {}
    for criterion in ("loss", "kl"):
        start = time.thread_time()
        truths[criterion] = vp.score(model, batches, criterion, "all", micro_batch=32)
        seconds[criterion] = round(time.thread_time() - start, 2)
    rows = []
    for criterion, reduction in CRITERIA:
        kinds = PER_TOKEN_KINDS if reduction == "token_abs" else KINDS
        start = time.thread_time()
        scores = vp.score(model, batches, criterion, kinds, reduction)  # pyright: ignore
        row: dict[str, Any] = {"criterion": criterion, "reduction": reduction}
        row["seconds"] = round(time.thread_time() - start, 2)
        for name, truth in truths.items():
            row[name] = {kind: round(agreement(model, scores, truth, kind), 3) for kind in kinds}
        rows.append(row)
        print(row, flush=True)
    now = datetime.datetime.now(datetime.timezone.utc)
    content = {
        "command": "python -m bench.criteria",
        "date": f"{now:%Y-%m-%d}",
        "commit": commit(),
        "versions": versions(),
        "model": "the dense model of `make prune` (digits, seed 0)",
        "images": IMAGES,
        "seconds": seconds,
        "criteria": rows,
    }
    path = RESULTS / f"{now:%Y%m}_criteria.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
