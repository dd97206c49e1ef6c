"""Our own: units are left out in rounds while the rest learns, may come back, and go in one cut.

data  dense  score-1 plan-1 distill-1 ... score plan prune sweep distill  evaluate  report

Every round scores all units by one backward (``taylor``), plans further towards the budget, fast at
first, and teaches what the plan keeps of the whole model. The last one cuts, refits what stays to
what the model computed before (the sweep), and teaches it by the logits and the manifold of the
dense model. `docs/recipes/fast.md` has what each part is worth.
"""

from __future__ import annotations

from vitprune_fast.recipes.standard import steps
from vitprune_fast.run.step import Recipe

# three rounds, and what follows the cut
_HUNDRED_EPOCHS = {"rounds": {"epochs": 15}, "distill": {"epochs": 55}}

RECIPE = Recipe(
    "fast",
    steps,
    {
        "score": {"units": ["all"]},
        "rounds": {"count": 4, "epochs": 5, "along": "cubic", "masks": True},
        "distill": {"loss": ["soft", "manifold"]},
    },
    {
        "digits": {"distill": {"epochs": 15}},
        "smoke": {"rounds": {"count": 3, "epochs": 1}, "distill": {"epochs": 2}},
        "images": {"rounds": {"epochs": 2}, "distill": {"epochs": 6}},
        "cifar": _HUNDRED_EPOCHS,
        "tiny-imagenet": _HUNDRED_EPOCHS,
        "mini-imagenet": _HUNDRED_EPOCHS,
        "imagenet": {"rounds": {"epochs": 30}, "distill": {"epochs": 220}},
    },
)
