"""A student is taught the manifold of a larger model's tokens, as it is or after a cut.

data  dense  [teacher]  student                     distill  evaluate  report
data  dense  [teacher]  score  plan  prune  sweep   distill  evaluate  report

After Hao et al., "Learning efficient Vision Transformers via fine-grained manifold distillation"
(NeurIPS 2022, arXiv:2107.01378): similarities of tokens within an image, across images, and of
random ones. The paper teaches a fresh small model, which ``--student`` names; without one the dense
model is cut, and what is left is taught. The dense model is the teacher in both.
"""

from __future__ import annotations

from typing import Any

from vitprune_fast.config.run import RunConfig
from vitprune_fast.recipes import standard
from vitprune_fast.recipes.standard import is_unset, judged, opened, require, taught
from vitprune_fast.run import steps as do
from vitprune_fast.run.step import Recipe, Step


def steps(config: RunConfig) -> list[Step]:
    """A fresh student in place of a cut, or the standard steps."""
    losses = config.distill.loss
    named = any(loss.rpartition(":")[2].startswith("manifold") for loss in losses)
    require(config.recipe, {"distill.loss": (named, "hold one of manifold", losses)})
    if not config.student.name:
        return standard.steps(config)
    nothing = "not be given (a fresh student is not cut; --student '' cuts the dense model)"
    require(config.recipe, is_unset(config, nothing))
    return taught_afresh(config)


def taught_afresh(config: RunConfig) -> list[Step]:
    """The steps that teach a fresh student, by whatever losses."""
    made, teachers = opened(config)
    return [
        *made,
        Step("student", do.student, {"dense": "dense"}, {"model": "student"}),
        taught("student", teachers),
        *judged({"before": "dense", "after": "model"}),
    ]


def _small_vit(width: int) -> dict[str, Any]:
    """The settings of a student like the digits' dense model."""
    args = {"patch_size": 2, "embed_dim": width, "depth": 4, "num_heads": 2}
    own = {"class_token": False, "global_pool": "avg", "weight_init": "jax"}
    name = "vit_tiny_patch16_224"
    # it has everything to learn
    return {"student": {"name": name, "args": {**args, **own}}, "distill": {"lr": 2e-3}}


_TINY = "deit_tiny_patch16_224"
_TERMS = ["manifold_intra", "manifold_inter", "manifold_random"]
# of the student and of the teacher, which is twice as deep
_PAIRS = [[0, 0], [1, 1], [2, 2], [3, 3], [8, 20], [9, 21], [10, 22], [11, 23]]

RECIPE = Recipe(
    "manifold",
    steps,
    {"distill": {"loss": ["soft", *_TERMS], "alpha": 1.0, "temperature": 1.0}},
    {
        "digits": _small_vit(32),
        "smoke": _small_vit(16),
        "cifar": {"student": {"name": _TINY}},
        "tiny-imagenet": {"student": {"name": _TINY, "args": {"img_size": 64, "patch_size": 8}}},
        "mini-imagenet": {"student": {"name": _TINY, "args": {"img_size": 84, "patch_size": 12}}},
        "imagenet": {
            "model": {"name": "cait_s24_224.fb_dist_in1k"},
            "student": {"name": _TINY},
            "distill": {"layers": _PAIRS, "drop_path": 0.0},
        },
    },
)
