"""What is compared: an arm is a recipe with settings, on the dense model of a seed.

All arms see as many images after the dense model is made: those of 30 epochs, in one training or in
several. Models from scratch, and fresh students, also see as many as the dense model did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.evidence import rivals
from vitprune_fast.config.run import RunConfig
from vitprune_fast.recipes import manifold, standard
from vitprune_fast.recipes.presets import preset
from vitprune_fast.run.step import Recipe, Step

SEEDS = (0, 1, 2, 3, 4)
SHARES = (0.5, 0.25)
EPOCHS, DENSE_EPOCHS, STUDENT_EPOCHS = 30, 150, 40
OURS, PEER = "fast", "torch-pruning, all widths"
# on the way to the share in width, so that whole blocks are left to the rest
_IN_WIDTH = {0.5: 0.6, 0.25: 0.52}
# a student of about the share: embedding channels, heads
_STUDENTS = {0.5: (44, 4), 0.25: (30, 2)}

Settings = Mapping[str, Any]


# settings are no values to compare
@dataclass(frozen=True, eq=False)
class Arm:
    """One line of a table.

    Attributes:
        name: as the table has it.
        recipe: a recipe or its name.
        settings: by the share of the multiply-accumulates that stays.
        shape_of: the arm whose model is the shape of this one's, made before it.
    """

    name: str
    recipe: Recipe | str
    settings: Callable[[float], Settings]
    shape_of: str = ""


def _macs(share: float) -> Settings:
    return {"plan": {"macs": share}}


def _with(more: Settings, share: float) -> Settings:
    return {**_macs(share), **more}


def _by_gates(share: float) -> Settings:
    learnt = EPOCHS // 3
    return {"gates": {"macs": share, "epochs": learnt}, "distill": {"epochs": EPOCHS - learnt}}


def _width_depth(share: float) -> Settings:
    way = {"count": 2, "epochs": EPOCHS // 2, "split": [_IN_WIDTH[share]]}
    return {"plan": {"macs": share, "params": None}, "rounds": way}


def student(share: float) -> Settings:
    """A fresh student of about so many multiply-accumulates."""
    width, heads = _STUDENTS[share]
    args = {**preset("digits", "manifold").student.args, "embed_dim": width, "num_heads": heads}
    return {"student": {"args": args}}


def _fresh(share: float) -> Settings:
    # it has everything to learn, as models from scratch have
    return {**student(share), "distill": {"epochs": DENSE_EPOCHS + EPOCHS}}


def _cut_instead(share: float) -> Settings:
    """Of the manifold recipes, which teach what is cut where no student is named."""
    taught = {"lr": None, "epochs": EPOCHS}
    return {**_macs(share), "student": {"name": "", "args": {}}, "distill": taught}


def _rival(name: str, cut: Callable[[RunConfig], list[Step]]) -> Recipe:
    """A recipe that cuts in its own way, and teaches as `fast` does."""

    def steps(config: RunConfig) -> list[Step]:
        made, teachers = standard.opened(config)
        rows = {"before": "dense", "cut": "pruned", "after": "model"}
        taught = standard.taught("pruned", teachers)
        return [*made, *cut(config), taught, *standard.judged(rows)]

    taught = {"loss": list(preset("digits", OURS).distill.loss), "epochs": EPOCHS}
    return Recipe(name, steps, {"distill": taught, "sweep": {"compensate": False}})


def _by_scores(config: RunConfig) -> list[Step]:
    return [*standard.scored("dense"), *standard.smaller(config, "dense")[0]]


def _at_random(config: RunConfig) -> list[Step]:
    score, *others = _by_scores(config)
    return [replace(score, function=rivals.random_scores, shared=False), *others]


def _by(function: Callable[..., Any], config: RunConfig) -> list[Step]:
    return [Step("prune", function, {"model": "dense"}, {"pruned": "pruned"})]


def _from_scratch(name: str, **distill: Any) -> Recipe:
    """New weights in the shape of the run's model."""

    def steps(config: RunConfig) -> list[Step]:
        made, teachers = standard.opened(config)
        fresh = Step("fresh", rivals.from_scratch, {"like": "dense"}, {"model": "fresh"})
        rows = standard.judged({"before": "dense", "after": "model"})
        return [*made, fresh, standard.taught("fresh", teachers), *rows]

    # all that the dense model saw, and all that the others saw after it
    long = {"epochs": DENSE_EPOCHS + EPOCHS, "lr": 2e-3, "warmup_epochs": 5}
    return Recipe(name, steps, {"distill": {**long, **distill}})


_LOSS = list(preset("digits", OURS).distill.loss)

ARMS = (
    Arm(OURS, OURS, _macs),
    Arm(PEER, _rival("torch-pruning", partial(_by, rivals.torch_pruned)), _macs),
    Arm(
        "torch-pruning, heads and neurons",
        _rival("torch-pruning-inside", partial(_by, rivals.torch_pruned_inside)),
        _macs,
    ),
    Arm("random", _rival("random", _at_random), _macs),
    Arm(
        "magnitude",
        _rival("magnitude", _by_scores),
        partial(_with, {"score": {"criterion": "magnitude"}}),
    ),
    Arm("one-shot", "one-shot", _macs),
    Arm("kd-cnn", "kd-cnn", _by_gates),
    Arm("width-depth", "width-depth", _width_depth),
    Arm("manifold, cut", "manifold", _cut_instead),
    Arm("manifold-full, cut", "manifold-full", _cut_instead),
    Arm("unified", "unified", _macs),
    Arm("fixed-ratio", "fixed-ratio", lambda share: {"search": {"macs": share}}),
    Arm(
        "auto-ratio",
        "auto-ratio",
        lambda share: {"search": {"mode": "equal-macs", "macs": share}},
    ),
    Arm("manifold, fresh student", "manifold", _fresh),
    Arm(
        "from scratch, distilled",
        _from_scratch("from-scratch-distilled", loss=_LOSS),
        lambda share: {},
        shape_of=OURS,
    ),
    Arm(
        "from scratch",
        _from_scratch("from-scratch", loss=["soft"], alpha=0.0),
        lambda share: {},
        shape_of=OURS,
    ),
)

# the same fresh student, teacher and images
LOSSES = {
    "labels alone": {"loss": ["soft"], "alpha": 0.0},
    "soft": {"loss": ["soft"]},
    "hard": {"loss": ["hard"], "alpha": 0.5},
    **{
        f"soft, {name.replace('_', ' ')}": {"loss": ["soft", name]}
        for name in ("hidden", "relation", "manifold_intra", "manifold_inter", "manifold_random")
    },
    "manifold": {"loss": ["soft", "manifold_intra", "manifold_inter", "manifold_random"]},
    "manifold-full": {"loss": ["soft", "manifold_full"]},
}


def taught_by(losses: Settings, share: float) -> Settings:
    """A fresh student, taught by these losses."""
    return {**student(share), "distill": {"epochs": STUDENT_EPOCHS, **losses}}


_STUDENT = replace(manifold.RECIPE, name="fresh-student", steps=manifold.taught_afresh)

STUDENTS = tuple(Arm(name, _STUDENT, partial(taught_by, losses)) for name, losses in LOSSES.items())

# accuracy that a cut may lose on the validation images, before anything is trained
TOLERANCES = (0.02, 0.05)


def _within(mode: str, tolerance: float, share: float) -> Settings:
    return {"search": {"mode": mode, "tolerance": tolerance, "macs": None}}


RATIOS = tuple(
    Arm(f"{recipe}, {tolerance}", recipe, partial(_within, mode, tolerance))
    for tolerance in TOLERANCES
    for recipe, mode in (("fixed-ratio", "fixed"), ("auto-ratio", "iterative"))
)


def dense_of(folder: Path) -> Settings:
    """Settings of a run that begins with this model."""
    return {"model": {"name": str(folder), "args": {}}, "train_dense": False}
