"""All components by one ratio: heads, neurons, embedding channels and blocks.

data  dense  [teacher]  score  plan  prune  distill  evaluate  report

After Yu and Wu, "A unified pruning framework for Vision Transformers" (UP-ViTs; Science China
Information Sciences 2023, arXiv:2111.15127): units are ranked inside a layer by the KL divergence
of the output without them, every layer keeps the same share, and the result has the shape of a
smaller standard model. Scores are the second order of that divergence, by one backward
(``fisher``); ``--criterion kl`` leaves out one unit after the other, as the paper does.
"""

from __future__ import annotations

from vitprune_fast.config.run import RunConfig
from vitprune_fast.recipes import standard
from vitprune_fast.run.step import Recipe, Step


def steps(config: RunConfig) -> list[Step]:
    """The standard steps; every layer keeps the same share."""
    allocation = config.plan.allocation
    rules = {"allocation": (allocation == "uniform", "be uniform", allocation)}
    standard.require("unified", rules)
    return standard.steps(config)


_COMPONENTS = ["head", "neuron", "embed", "block"]
# a PVTv2 is made narrower inside its heads, of which the first stage has one
_OF_PVTV2 = ["qk_dim", "v_dim", "neuron", "embed", "block"]


def _keep(kinds: list[str], share: float, **others: float) -> dict[str, float]:
    return {**dict.fromkeys(kinds, share), **others}


RECIPE = Recipe(
    "unified",
    steps,
    {
        "score": {"criterion": "fisher"},
        "plan": {"units": _COMPONENTS, "allocation": "uniform"},
        "sweep": {"compensate": False},
        "distill": {"loss": ["soft_sum"], "alpha": 0.1667, "temperature": 1.0},
    },
    {
        "smoke": {"plan": {"keep": _keep(_COMPONENTS, 0.5), "keep_ends": False}},
        "smoke-pvtv2": {
            "model": {
                "name": "pvt_v2_b0",
                "args": {
                    # of any size, it says this way which one it is to be shown
                    "pretrained_cfg_overlay": {"input_size": [1, 32, 32]},
                    "in_chans": 1,
                    "depths": [2, 2, 2, 2],
                    "embed_dims": [8, 16, 40, 64],
                    "num_heads": [1, 2, 5, 8],
                    "mlp_ratios": [4, 4, 4, 4],
                },
            },
            "dense": {"epochs": 10},
            "plan": {
                "units": _OF_PVTV2,
                "keep": _keep(_OF_PVTV2, 0.5),
                "round_to": {"qk_dim": 1, "v_dim": 1, "neuron": 1},
            },
            "distill": {"loss": ["features"]},
        },
        "imagenet": {
            "data": {"policy": "", "repeats": 1, "batch_size": 32},
            "plan": {"keep": _keep(_COMPONENTS, 0.25, block=1.0)},
            "distill": {
                "epochs": 200,
                "lr": 1e-3,
                "lr_batch": 256,
                "min_lr": 1e-7,
                "warmup_epochs": 2,
                "warmup_lr": 0.0,
                "cooldown_epochs": 0,
                "weight_decay": 1e-3,
                "drop_path": 0.1,
                "mixup": 0.0,
                "cutmix": 0.5,
                "cutmix_larger": True,
                "label_smoothing": 0.0,
                "erase": 0.0,
                "ema": 0.999,
                "ema_every": "epoch",
            },
        },
        # to the shape of DeiT-S instead of DeiT-Ti
        "imagenet-deit-s": {"plan": {"keep": _keep(_COMPONENTS, 0.5, block=1.0)}},
        # B2 to the widths of B0, and to the number of blocks of B1
        "imagenet-pvtv2-b0": {
            "model": {"name": "pvt_v2_b2"},
            "plan": {
                "units": _OF_PVTV2,
                "keep": _keep(_OF_PVTV2, 0.5),
            },
            "distill": {"loss": ["features"]},
        },
        "imagenet-pvtv2-b1": {
            "model": {"name": "pvt_v2_b2"},
            "plan": {
                "units": ["block"],
                "keep": {"block": 0.5},
            },
            "distill": {"loss": ["features"]},
        },
    },
)
