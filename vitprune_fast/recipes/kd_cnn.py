"""Gates learn what may go while a CNN teaches, which goes on teaching after the cut.

data  dense  teacher-0  gates  prune  distill  evaluate  report

After Xu et al., "Knowledge-distillation-integrated pruning of Vision Transformers" (ISCIT 2022), of
which only the abstract is public; docs/recipes/kd-cnn.md says what is ours.
"""

from __future__ import annotations

from vitprune_fast.config.run import RunConfig
from vitprune_fast.recipes import standard
from vitprune_fast.run.step import Recipe, Step


def steps(config: RunConfig) -> list[Step]:
    """The standard steps with gates and teachers."""
    gates, distill = config.gates, config.distill
    rules = {
        "gates": (
            gates.kind not in ("none", "fixed"),
            "be l1, ste or hard_concrete, which learn,",
            gates.kind,
        ),
        "teacher": (bool(config.teachers.names), "name a model of timm or a folder", "none"),
        "alpha": (distill.needs_teacher, "be above 0", distill.alpha),
    }
    standard.require("kd-cnn", rules)
    return standard.steps(config)


# 8x8 pixels are few for the strides of a CNN; this one is right more often than the dense model
_SMALL_CNN = {"names": ["test_resnet"], "pretrained": False, "size": 32, "epochs": 30, "lr": 2e-3}
# where weights of ImageNet have seen the images
_FRESH_CNN = {"pretrained": False, "epochs": 100, "lr": 1e-3}

RECIPE = Recipe(
    "kd-cnn",
    steps,
    {
        "gates": {"kind": "hard_concrete", "budget": True, "epochs": 30},
        # its weights of ImageNet, tuned to other classes where the data has others
        "teachers": {"names": ["regnety_040"], "epochs": 10, "lr": 1e-4},
        "sweep": {"compensate": False},
        "distill": {"loss": ["hard"]},
    },
    {
        "smoke": {
            "model": {
                "name": "deit_tiny_distilled_patch16_224",
                "args": {
                    "img_size": 8,
                    "patch_size": 2,
                    "in_chans": 1,
                    "embed_dim": 32,
                    "depth": 4,
                    "num_heads": 4,
                    "weight_init": "jax",
                },
            },
            "dense": {"epochs": 16},
            "teachers": {**_SMALL_CNN, "epochs": 4},
            "gates": {"epochs": 6},
        },
        "digits": {"teachers": _SMALL_CNN, "gates": {"epochs": 15}},
        "tiny-imagenet": {"teachers": _FRESH_CNN},
        "mini-imagenet": {"teachers": _FRESH_CNN},
        "imagenet": {
            "model": {"name": "deit_base_distilled_patch16_224"},
            "teachers": {"names": ["regnety_160.deit_in1k"]},
        },
    },
)
