"""What multiples of neurons cost in accuracy: the evidence for the default of `round_to`.

python -m bench.rounding [--work runs/evidence]

The ViT-S/14 of bench.dense_models, tuned to photographs; cut by the default plan, and swept.
Writes bench/results/<yyyymm>_rounding.json.
"""

from __future__ import annotations

from typing import Any

import vitprune_fast as vp
from bench.default_plan import Subject, measured_on_tuned

MODEL, CRITERION = "cifar10", "taylor square"


def rows(subject: Subject) -> list[dict[str, Any]]:
    """Quality of the pruned model for each share of the MACs and each multiple."""
    structure, found = vp.describe(subject.model), []
    whole = vp.predict_cost(structure)
    for macs in (0.5, 0.3):
        for multiple in (1, 8, 64):
            budget, steps = vp.Budget(macs=macs), {"neuron": multiple}
            plan = vp.plan(subject.model, subject.scores(CRITERION), budget, round_to=steps)
            met = round(vp.predict_cost(structure, plan).macs / whole.macs, 5)
            quality = subject.qualities(plan)
            found.append({"macs": macs, "multiple": multiple, "met": met, **quality})
            print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    measured_on_tuned(__doc__, "rounding", MODEL, rows)
