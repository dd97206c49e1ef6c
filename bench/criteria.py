"""How well each criterion ranks units, against leaving every unit out in turn, on a trained model.

python -m bench.criteria [FOLDER]   FOLDER holds the dense model of a digits run (runs/digits/dense)

Writes bench/results/<yyyymm>_criteria.json, from which `python bench/table.py` makes the table. The
images are training images; the ranks are Spearman's, inside each axis, averaged over the axes.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from scipy.stats import spearmanr

import vitprune_fast as vp
from bench import study
from vitprune_fast.data import Loader
from vitprune_fast.scoring.taylor import PER_TOKEN_KINDS

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
    model, data = study.opened(folder)
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
    study.write("criteria", images=IMAGES, seconds=seconds, criteria=rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
