"""What multiples of neurons cost in accuracy: the evidence for the default of `round_to`.

python -m bench.rounding [--work runs/evidence]

The ViT-S/14 of bench.dense_models, tuned to photographs; cut by the default plan, and swept.
Writes bench/results/<yyyymm>_rounding.json.
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

MODEL, CRITERION = "cifar10", "taylor square"


def rows(subject: Subject) -> list[dict[str, Any]]:
    """Quality of the pruned model for each share of the MACs and each multiple."""
    found = []
    for macs in (0.5, 0.3):
        for multiple in (1, 8, 64):
            budget, steps = vp.Budget(macs=macs), {"neuron": multiple}
            plan = vp.plan(subject.model, subject.scores(CRITERION), budget, round_to=steps)
            pruned = {state: subject.pruned(plan, state) for state in ("cut", "swept")}
            quality = {state: subject.quality(model) for state, model in pruned.items()}
            met = round(vp.cost(pruned["cut"]).macs / vp.cost(subject.model).macs, 5)
            found.append({"macs": macs, "multiple": multiple, "met": met, **quality})
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    torch.set_num_threads(1)
    keep_freed_memory()
    found = rows(Subject(parser.parse_args().work, MODEL))
    study.write("rounding", model=f"ViT-S/14 tuned to photographs ({MODEL}) at 84 px", rows=found)


if __name__ == "__main__":
    main()
