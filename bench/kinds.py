"""What cutting other kinds of units beside heads and neurons keeps: evidence for joint budgets.

python -m bench.kinds [--work runs/evidence]

The ViT-S/14 of bench.dense_models, tuned to photographs; all kinds are scored at once, cut together
to a share of the multiply-accumulates, and swept. Writes bench/results/<yyyymm>_kinds.json.
"""

from __future__ import annotations

from typing import Any

import vitprune_fast as vp
from bench.default_plan import Subject, measured_on_tuned

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
            cost = vp.predict_cost(structure, plan)
            met = {"met": round(cost.macs / whole.macs, 4)}
            met["params"] = round(cost.params / whole.params, 4)
            kept = {
                kind: sum(len(plan[a.name]) for a in structure.units(kind))
                / sum(a.size for a in structure.units(kind))
                for kind in (*WIDTH, *DIMS, "embed", *DEPTH)
            }
            rounded = {kind: round(share, 3) for kind, share in kept.items()}
            row = {"macs": macs, "kinds": name, **met, "kept": rounded}
            found.append({**row, **subject.qualities(plan)})
            print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    measured_on_tuned(__doc__, "kinds", MODEL, rows)
