"""What cutting other kinds of units beside heads and neurons keeps: evidence for joint budgets.

python -m bench.kinds [--work runs/evidence]

The ViT-S/14 of bench.dense_models, tuned to photographs; all kinds are scored at once, cut together
to a share of the multiply-accumulates, and swept. Writes bench/results/<yyyymm>_kinds.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import vitprune_fast as vp
from bench import study
from bench.default_plan import Subject
from bench.dense_models import WORK
from bench.harness import keep_freed_memory

MODEL = "cifar10"
WIDTH, DIMS, DEPTH = ["head", "neuron"], ["qk_dim", "v_dim"], ["block"]
KINDS = {
    "heads, neurons": WIDTH,
    "and dims": WIDTH + DIMS,
    "and blocks": WIDTH + DEPTH,
    "and dims and blocks": WIDTH + DIMS + DEPTH,
    "and channels": [*WIDTH, "embed"],
}


def rows(subject: Subject) -> list[dict[str, Any]]:
    """Quality of the pruned model for each share of the MACs and each set of kinds."""
    model = subject.model
    scores = vp.score(model, subject.calibration(), reduction="square", units="all")
    structure, found = vp.describe(model), []
    whole = vp.predict_cost(structure)
    for macs in (0.5, 0.3):
        for name, units in KINDS.items():
            plan = vp.plan(structure, scores, macs, units=units)
            pruned = {state: subject.pruned(plan, state) for state in ("cut", "swept")}
            quality = {state: subject.quality(each) for state, each in pruned.items()}
            cost = vp.predict_cost(structure, plan)
            met = {"met": round(cost.macs / whole.macs, 4)}
            met["params"] = round(cost.params / whole.params, 4)
            kept = {
                kind: sum(len(plan[a.name]) for a in structure.units(kind))
                / sum(a.size for a in structure.units(kind))
                for kind in (*WIDTH, *DIMS, "embed", *DEPTH)
            }
            rounded = {kind: round(share, 3) for kind, share in kept.items()}
            found.append({"macs": macs, "kinds": name, **met, "kept": rounded, **quality})
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    torch.set_num_threads(1)
    keep_freed_memory()
    found = rows(Subject(parser.parse_args().work, MODEL))
    study.write("kinds", model=f"ViT-S/14 tuned to photographs ({MODEL}) at 84 px", rows=found)


if __name__ == "__main__":
    main()
