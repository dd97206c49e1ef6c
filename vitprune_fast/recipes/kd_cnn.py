"""Gates learn what may go while a CNN teaches, which goes on teaching after the cut.

data  dense  teacher-0  gates  prune  distill  evaluate  report

After Xu et al., "Knowledge-distillation-integrated pruning of Vision Transformers" (ISCIT 2022), of
which only the abstract is public.
"""

from __future__ import annotations

from vitprune_fast.config.run import RunConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes import standard
from vitprune_fast.run.step import Recipe, Step


def steps(config: RunConfig) -> list[Step]:
    """The standard steps with gates and a teacher."""
    if config.gates.kind == "none":
        raise InvalidInput("run: gates must be learnt for the recipe kd-cnn, got none")
    return standard.steps(config)


RECIPE = Recipe(
    "kd-cnn",
    steps,
    {
        "gates": {"kind": "l1", "budget": True},
        "teachers": {"names": ["resnet18"], "pretrained": False},
        "sweep": {"compensate": False},
        "distill": {"loss": ["hard"]},
    },
)
