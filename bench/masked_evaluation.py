"""What a candidate of the search costs beside a plain evaluation of the model: time of one thread.

python -m bench.masked_evaluation

Half of the heads and neurons of a DeiT-Ti behind masks, and the model as it is, in turns on the
same images. Writes bench/results/<yyyymm>_masked_evaluation.json.
"""

from __future__ import annotations

import timm
import torch

import vitprune_fast as vp
from bench import study
from bench.bench_masked_step import half
from vitprune_fast.benches.harness import keep_freed_memory
from vitprune_fast.search.evaluations import OnBatches
from vitprune_fast.timing import in_turns, measure, spread

MODEL, BATCH, BATCHES, ROUNDS = "deit_tiny_patch16_224", 32, 2, 10


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    structure = vp.describe(model)
    size, classes = structure.input_size, 1000
    batches = [(torch.randn(BATCH, *size), torch.arange(BATCH) % classes) for _ in range(BATCHES)]
    plan, masked = half(structure), OnBatches(model, structure, batches, None)
    # outputs first: the masked model is the pruned one
    wanted, got = vp.evaluate(vp.prune(model, plan), batches).loss, masked(plan).loss
    if wanted is None or got is None or abs(got - wanted) > 1e-5 * wanted:
        raise AssertionError(f"the masked model must have the loss {wanted}, got {got}")
    forms = {"masked": lambda: masked(plan), "plain": lambda: vp.evaluate(model, batches)}
    times = in_turns(
        {name: lambda form=form: measure(form, "cpu") for name, form in forms.items()}, ROUNDS
    )
    found = {
        name: {"seconds": round(min(taken), 4), "spread": round(spread(taken), 4)}
        for name, taken in times.items()
    }
    ratio = round(min(times["masked"]) / min(times["plain"]), 4)
    print(found, ratio)
    study.write(
        "masked_evaluation",
        model=f"{MODEL}, random weights",
        images=BATCH * BATCHES,
        forms=found,
        masked_over_plain=ratio,
    )


if __name__ == "__main__":
    main()
