"""The recipe as plain values: the one source of flags, YAML files and the Python API.

A field's docstring is its `--help` text. Nothing here imports torch, so `--help` stays quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Suppress, arg
from tyro.constructors import PrimitiveConstructorSpec

from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.model import Amount, ModelConfig, Pairs, StudentConfig, parse_pairs
from vitprune_fast.config.rules import (
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    PositiveShare,
    Rule,
    Share,
    check,
)
from vitprune_fast.config.search import SearchConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.precision import Precision
from vitprune_fast.registry import described, names

Count = Annotated[int | None, arg(metavar="N")]
Threads = Annotated[
    int | None,
    arg(
        metavar="N",
        help="Torch threads on the CPU; unset: OMP_NUM_THREADS, or one per available core.",
    ),
]


Computed = Annotated[
    Precision,
    arg(help="What models compute in; auto: bfloat16 on a GPU that has it, float32 elsewhere."),
]


def _chosen(folder: str, what: str) -> Any:
    """How a flag shows that it takes one of the names of a folder."""
    return arg(metavar="|".join(names(folder)), help=f"{what}: {described(folder)}")


def _known(folder: str) -> Rule:
    """The name of a file in a folder."""
    return Rule(f"one of {', '.join(names(folder))}", names(folder).__contains__)


CRITERIA, ALLOCATIONS = "scoring/criteria", "planning/allocations"
Criterion = Annotated[str, _chosen(CRITERIA, "What is measured of a unit"), _known(CRITERIA)]
Allocation = Annotated[
    str, _chosen(ALLOCATIONS, "How the budget is spread over the layers"), _known(ALLOCATIONS)
]


@dataclass(frozen=True)
class ShownConfig:
    """Which images, and how they are read to be looked at as they are."""

    source: Annotated[
        str,
        arg(name="data", metavar="digits|folder:PATH|tar:PATH|wds:PATH|hfds:NAME"),
    ] = "digits"
    """`digits` (1,797 real 8x8 images, embedded), `folder:PATH` (a folder per class; or ImageNet,
    Tiny-ImageNet, Mini-ImageNet or CIFAR as they are shipped), `tar:PATH` (class folders in a tar),
    `wds:PATH` (webdataset shards) or `hfds:NAME` (a data set of the Hugging Face hub, or the path
    of a saved one)."""
    batch_size: Annotated[int, arg(metavar="N")] = 64
    """Images per step."""
    mean: Annotated[tuple[float, ...] | None, arg(metavar="NUMBER ...")] = None
    """Per channel, subtracted from pixels in 0..1; unset: what the weights were trained with."""
    std: Annotated[tuple[float, ...] | None, arg(metavar="NUMBER ...")] = None
    """Per channel, divides; unset: what the weights were trained with."""
    crop_share: Amount = None
    """Share of a photograph that testing looks at, of the side that crop-mode fits (timm's
    crop_pct); unset: the weights' own, or all."""
    crop_mode: Literal["center", "squash", "border"] | None = None
    """How testing fits a photograph: `center` cuts off what the longer side has more, `squash`
    resizes both sides to the same, `border` fills what the shorter side has less; unset: the
    weights' own, or center."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """How photographs are resized; unset: the weights' own, or bicubic."""
    validation: Annotated[float | None, arg(metavar="N|SHARE")] = None
    """Images of photographs held back from training to choose by: a share below 1 of every class,
    or how many in all; unset: 10 %, and in large sets 10 images a class, 5,000 in all at least."""
    max_bad: Annotated[Share, arg(metavar="SHARE")] = 0.01
    """Largest share of unreadable images that may be set aside; above it the run stops."""
    workers: Count = None
    """Processes that read images; unset: chosen. Any number gives the same stream."""

    def __post_init__(self) -> None:
        check("data", self)


@dataclass(frozen=True)
class DataConfig(ShownConfig):
    """Which images, how they are read, and how training varies them."""

    augment: bool = True
    """Vary training images at random (digits: small affine maps; photographs: crops, flips)."""
    policy: str = ""
    """Further changes of photographs in timm's words, e.g. rand-m9-mstd0.5-inc1 (RandAugment of
    DeiT) or 3a (3-Augment of DeiT III: grey, solarised or blurred)."""
    crop: Literal["resized", "simple"] = "resized"
    """Training windows of photographs: `resized`, of any size from crop-scale on; `simple`, as
    large as the photograph allows (DeiT III)."""
    crop_scale: Annotated[PositiveShare, arg(metavar="SHARE")] = 0.35
    """Smallest share of a photograph's area that a resized window has (DeiT and UP-ViT: 0.08)."""
    color_jitter: Share = 0.0
    """Largest change of the brightness, contrast and saturation of photographs, as a share (DeiT
    III: 0.3; DeiT's 0.4 is off together with its RandAugment)."""
    repeats: Annotated[int, arg(metavar="N")] = 1
    """Augmented copies of an image in a row, each for another process where there are several;
    epochs stay as long (DeiT has 3)."""


@dataclass(frozen=True)
class ScoreConfig:
    """How the importance of units is measured."""

    criterion: Criterion = "taylor"
    reduction: Literal["abs", "square", "signed", "token_abs", "l1", "l2", "group"] | None = None
    """How per-sample scores (or weights) become one number per unit; unset: the criterion's own."""
    units: Annotated[tuple[str, ...], arg(metavar="KIND ...")] = ()
    """Unit kinds to score: head, qk_dim, v_dim, neuron, embed, attn_branch, mlp_branch, block; or
    `all`; unset: those that a plan cuts, heads and neurons if nothing else is said."""
    samples: Annotated[PositiveInt, arg(metavar="N", name="score-samples")] = 1024
    """Training images to score on (all of them when there are fewer)."""
    loss: Literal["ce", "bce"] = "ce"
    """What labels are held against, by `taylor` and `loss`: `ce`, cross-entropy; `bce`, binary
    cross-entropy of every class by itself."""
    objective: Annotated[Literal["logits", "features"], arg(name="score-objective")] = "logits"
    """`features` scores a model without a classifier, by `fisher`, `kl` or `taylor`; no label is
    read."""
    batch_size: Annotated[PositiveInt, arg(metavar="N", name="score-batch-size")] = 64
    """Images per scoring step; halved where memory does not hold so many."""
    draws: Annotated[PositiveInt, arg(metavar="N")] = 1
    """Labels or features drawn per image, for `fisher` and `features`."""
    candidates: Annotated[PositiveInt, arg(metavar="N")] = 32
    """Units left out at once, for `loss` and `kl`."""
    loss_scale: Annotated[float | None, arg(metavar="FACTOR")] = None
    """Keeps gradients in float16 from underflow; unset: 1024 there, 1 in all others."""
    cuda_graph: Literal["auto", "never", "always"] = "auto"
    """Replay a scoring step as a CUDA graph; auto: never, until committed results show a win."""

    def __post_init__(self) -> None:
        check("score", self)


def _parse_per_kind(words: list[str]) -> int | dict[str, Any]:
    if len(words) == 1 and "=" not in words[0]:
        return int(words[0])
    return parse_pairs(words)


_PerKind = Annotated[
    Any,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="N|KIND=N ...",
        instance_from_str=_parse_per_kind,
        is_instance=lambda value: value is None or isinstance(value, (int, dict)),
        str_from_instance=lambda value: (
            [f"{kind}={number}" for kind, number in value.items()]
            if isinstance(value, dict)
            else [str(value)]
        ),
    ),
]


def _per_kind(least: int) -> Rule:
    """A whole number, or one by unit kind."""

    def holds(value: Any) -> bool:
        numbers = value.values() if isinstance(value, dict) else (value,)
        return all(type(number) is int and number >= least for number in numbers)

    return Rule(f"a whole number of at least {least}, or one by kind", holds)


Way = Literal["factor", "linear", "cubic"]


def part_way(share: float, gone: float, along: Way) -> float:
    """What is left of 1 where so much of the way to a share is gone.

    `factor` falls by equal factors in equal parts; `linear` by equal amounts; `cubic` fast at
    first, as 1 - gone to the power of 3 (Zhu and Gupta 2017, arXiv:1710.01878, equation 1).
    """
    if along == "factor":
        return share**gone
    return share + (1 - share) * (1 - gone) ** (1 if along == "linear" else 3)


@dataclass(frozen=True)
class BudgetConfig:
    """What the smaller model may cost; half of the MACs when no budget is given."""

    macs: Amount = None
    """Budget in multiply-accumulates: a share of the dense model up to 1, or a number above 1;
    unset: 0.5 if no other budget is given."""
    params: Amount = None
    """Budget in parameters: a share up to 1, or a number above 1; with --macs both hold."""
    keep: Pairs = field(default_factory=dict)
    """Share of units to keep per kind, e.g. head=0.5 neuron=0.7; other kinds meet the budgets in
    MACs and parameters, or are kept whole where none is given."""

    def budget(self) -> dict[str, Any]:
        """The budget asked for, as keywords of `vp.Budget`."""
        values = {"macs": self.macs, "params": self.params, "keep": self.keep}
        given = {name: value for name, value in values.items() if value not in (None, {})}
        return given or {"macs": 0.5}


@dataclass(frozen=True)
class ConstraintConfig:
    """Which units a plan takes, whatever its budget."""

    allocation: Allocation = "global"
    normalization: Annotated[str | None, arg(metavar="NAME")] = None
    """How scores of different blocks are made comparable; unset: the planner's default."""
    min_units: Annotated[_PerKind, _per_kind(0)] = 1
    """Units every layer keeps at least, or by kind: head=1 neuron=0; 0 allows emptied layers."""
    round_to: Annotated[_PerKind | None, _per_kind(1)] = None
    """Keep a multiple of this many neurons, or by kind: neuron=64 embed=16; unset: 8 in layers of
    more than 256 and of dims in heads of more than 31, as GPUs want."""
    bounds: Pairs = field(default_factory=dict)
    """LEAST..MOST that layers keep, as shares or units, by kind or by name: neuron=0.25..0.9
    'blocks.0.*=0.5..'"""
    protect: Annotated[tuple[str, ...], arg(metavar="PATTERN ...")] = ()
    """Layers, branches and blocks that lose nothing, e.g. 'blocks.0.*'."""
    include: Annotated[tuple[str, ...], arg(metavar="PATTERN ...")] = ()
    """The only layers, branches and blocks that may lose units; unset: all."""
    keep_ends: bool = True
    """The first and the last block stay where blocks or branches are cut."""

    def __post_init__(self) -> None:
        check("plan", self)

    def counts(self) -> dict[str, Any]:
        """How many units a layer may keep, as keywords of `vp.plan`."""
        multiple = self.round_to
        if isinstance(multiple, int):
            multiple = {"neuron": multiple}
        return {"min_units": self.min_units, "round_to": multiple}

    def constraints(self) -> dict[str, Any]:
        """What may go of the kinds that are cut, as keywords of `vp.plan`."""
        return {
            **self.counts(),
            "bounds": {key: _ends_of(key, value) for key, value in self.bounds.items()},
            "protect": self.protect,
            "include": self.include or None,
            "keep_ends": self.keep_ends,
        }

    def choice(self) -> dict[str, Any]:
        """All of it, as keywords of `vp.plan`."""
        chosen = {"allocation": self.allocation, "normalization": self.normalization}
        return {**chosen, **self.constraints()}


# of several bases the last one's fields come first
@dataclass(frozen=True)
class PlanConfig(ConstraintConfig, BudgetConfig):
    """What the smaller model may cost, half of the MACs when no budget is given; and what goes."""

    units: Annotated[tuple[str, ...], arg(name="cut-units", metavar="KIND ...")] = (
        "head",
        "neuron",
    )
    """Unit kinds to cut: head, qk_dim, v_dim, neuron, embed, attn_branch, mlp_branch, block."""
    toward: Annotated[PositiveShare, Suppress] = 1.0
    """How much of the way to the budget is gone: rounds stop earlier."""
    along: Annotated[Way, Suppress] = "factor"
    """Which way that is, see `part_way`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind, share in self.keep.items():
            if (
                isinstance(share, bool)
                or not isinstance(share, (int, float))
                or not 0 <= share <= 1
            ):
                raise InvalidInput(
                    f"plan: keep must map unit kinds to shares in [0, 1], got {kind}={share!r}"
                )


def _ends_of(key: str, value: Any) -> Any:
    """Bounds as they are typed, `0.25..0.9`, or as a YAML list."""
    if not isinstance(value, str):
        return value
    try:
        low, high = (
            None if not end else float(end) if "." in end else int(end) for end in value.split("..")
        )
    except ValueError:
        raise InvalidInput(
            f"plan: bounds must look like {key}=LEAST..MOST, got {key}={value}"
        ) from None
    return low, high


LEAST_CALIBRATION = 512
"""Fewer images than these are said to be few, where there are more."""


@dataclass(frozen=True)
class SweepConfig:
    """After the cut: refit what stays to what the dense model computed, without labels."""

    compensate: bool = True
    """Refit what stays; without it the cut is all."""
    images: Annotated[int, arg(metavar="N", name="calibration-images")] = 1024
    """Training images to refit on (all of them when there are fewer); take 512 at least."""

    def __post_init__(self) -> None:
        if self.images < 2:
            raise InvalidInput(
                f"sweep: calibration-images must be at least 2, got {self.images}; "
                "--no-compensate refits nothing"
            )


@dataclass(frozen=True)
class TeacherConfig:
    """Who teaches, and how its answers are computed."""

    names: Annotated[tuple[str, ...], arg(name="teacher", metavar="DIR|NAME ...")] = ()
    """The dense model or any other, or several: saved folders, models of timm, or `self`, the model
    as it is now. One of timm that has other classes than the data, such as a CNN, is trained on the
    data first."""
    weights: Annotated[tuple[float, ...], arg(name="teacher-weights")] = ()
    """Weights of several teachers; unset: 1 each."""
    pretrained: Annotated[bool, arg(name="teacher-pretrained")] = True
    """A teacher of timm starts from its own weights, downloaded."""
    checkpoints: Annotated[Pairs, arg(metavar="NAME=FILE ...", name="teacher-checkpoint")] = field(
        default_factory=dict
    )
    """Weights for teachers of timm that were trained on the data as the student sees it:
    .safetensors, or a torch file without code."""
    epochs: Annotated[PositiveInt, arg(metavar="N", name="teacher-epochs")] = 30
    """For a teacher that is trained first."""
    lr: Annotated[float, arg(name="teacher-lr")] = 1e-3
    """For a teacher that is trained first."""
    size: Annotated[PositiveInt | None, arg(metavar="PIXELS", name="teacher-size")] = None
    """Images are resized to this height and width for teachers; unset: to the one a teacher takes,
    and not for one that takes any."""
    dtype: Annotated[Precision | None, arg(name="teacher-dtype")] = None
    """What teachers answer in; unset: that of their weights."""
    channels_last: Annotated[bool, arg(name="teacher-channels-last")] = False
    """Memory format of teachers' images, faster for a CNN on tensor cores."""
    compile: Annotated[bool, arg(name="teacher-compile")] = False
    """Run teachers through torch.compile."""

    def __post_init__(self) -> None:
        check("distill", self)
        if self.weights and len(self.weights) != len(self.names):
            raise InvalidInput(
                f"distill: teacher-weights must be one number per teacher ({len(self.names)}), "
                f"got {list(self.weights)}"
            )
        for name, file in self.checkpoints.items():
            of_timm = name in self.names and self.is_of_timm(name)
            if not of_timm or not isinstance(file, (str, Path)):
                raise InvalidInput(
                    "distill: teacher-checkpoint must be NAME=FILE for teachers that are models of "
                    f"timm, got {name}={file}; name it with --teacher as well"
                )

    def checkpoint(self, name: str) -> Path | None:
        """The file with the weights of a teacher, where one was given."""
        return Path(self.checkpoints[name]) if name in self.checkpoints else None

    @staticmethod
    def is_of_timm(name: str) -> bool:
        """Whether a teacher is a model of timm, and not `self` or a saved folder."""
        return name != "self" and not Path(name).is_dir()

    @property
    def short_names(self) -> tuple[str, ...]:
        """What losses call the teachers: a folder by its last part."""
        return tuple(Path(name).name for name in self.names)

    def check_losses(self, losses: tuple[str, ...]) -> None:
        """Refuses, before a teacher is trained, losses of teachers that are not there."""
        names = self.short_names or ("self",)
        if len(set(names)) < len(names):
            raise InvalidInput(
                f"distill: teachers must have a name of their own each, got {', '.join(names)}"
            )
        for word in losses:
            name = word.rpartition(":")[0]
            if name and name not in names:
                raise InvalidInput(
                    f"distill: loss must name one of the teachers ({', '.join(names)}), got "
                    f"{word!r}"
                )


@dataclass(frozen=True)
class GateConfig:
    """Learn with gates which units go, cut the model accordingly, and then teach what is left."""

    kind: Annotated[Literal["none", "l1", "ste", "hard_concrete", "fixed"], arg(name="gates")] = (
        "none"
    )
    """`l1`: a factor per unit, held down by its size; `ste`: 0 or 1 with straight-through
    gradients, by thresholds that keep gate-macs of the units, or that every layer learns with
    gate-budget; `hard_concrete`: at random in [0, 1]; `fixed`: 0 or 1 by scores at the start, while
    the weights alone learn."""
    units: Annotated[tuple[str, ...], arg(name="gate-units")] = ("head", "neuron")
    """Unit kinds that get gates."""
    macs: Annotated[PositiveShare, arg(metavar="SHARE", name="gate-macs")] = 0.5
    """Multiply-accumulates left after the cut, as a share of the model's."""
    epochs: Annotated[PositiveInt, arg(metavar="N", name="gate-epochs")] = 10
    """Epochs in which gates and weights learn together, before the cut."""
    penalty: Annotated[NonNegative, arg(name="gate-penalty")] = 1e-4
    """Weight of the size of the gates in the loss."""
    budget: Annotated[bool, arg(name="gate-budget")] = False
    """Also drive the gates towards gate-macs while they learn, by a penalty that rises until they
    are there."""

    def __post_init__(self) -> None:
        check("distill", self)
        if not self.units or not {*self.units} <= {"head", "neuron"}:
            raise InvalidInput(
                f"distill: gate-units must be head, neuron or both, got {self.units}"
            )

    @property
    def settles(self) -> bool:
        """Whether the gates themselves are driven to say what goes, down to `macs`."""
        return self.budget and self.kind in ("ste", "hard_concrete")


@dataclass(frozen=True)
class MaskConfig:
    """Prune while training: 0/1 masks that grow, steps that run on what is live, then the cut."""

    macs: Annotated[float | None, arg(metavar="SHARE", name="mask-macs")] = None
    """Multiply-accumulates left in the end, as a share of the model's; unset: no masks."""
    shape: Annotated[Literal["one_shot", "linear", "cubic"], arg(name="mask-shape")] = "cubic"
    """How the share falls."""
    start: Annotated[float, arg(metavar="SHARE", name="mask-start")] = 0.0
    """Share of the run before the first units go."""
    end: Annotated[float, arg(metavar="SHARE", name="mask-end")] = 0.5
    """Share of the run after which the masks stay."""
    every: Annotated[int, arg(metavar="STEPS", name="mask-every")] = 50
    """Steps between two changes."""
    samples: Annotated[int, arg(metavar="N", name="mask-samples")] = 256
    """Training images to score on at each change."""
    attention: Literal["auto", "masked", "compact"] = "auto"
    """How steps attend while heads are dead: `compact`, the live heads alone; `masked`, all of them
    by an op that skips dead ones; `auto`, the quicker by what was measured on such a device."""


@dataclass(frozen=True)
class RoundConfig:
    """Cut in several rounds, each from scores of what the one before left."""

    count: Annotated[PositiveInt, arg(metavar="N", name="rounds")] = 1
    """Rounds of scoring, planning, cutting and refitting."""
    epochs: Annotated[NonNegativeInt, arg(metavar="N", name="round-epochs")] = 0
    """Epochs of teaching at the end of every round but the last, which all of the teaching
    follows."""
    along: Annotated[Way, arg(name="round-shape")] = "factor"
    """How budgets fall from round to round: by one `factor`, by equal amounts (`linear`), or fast
    at first (`cubic`)."""
    masks: Annotated[bool, arg(name="round-masks")] = False
    """Leave units out of the teaching instead of cutting them, so that they can come back in a
    later round, and cut once, in the last."""
    split: Annotated[tuple[float, ...], arg(name="round-split", metavar="SHARE ...")] = ()
    """How much of the way to the budget is gone after each round but the last, rising in (0, 1);
    unset: equal parts."""

    def gone(self, number: int) -> float:
        """Which share of the way to the budget is gone after a round, counted from 1; 0 before."""
        if not self.split:
            return number / self.count
        return (0.0, *self.split, 1.0)[number]

    def __post_init__(self) -> None:
        check("run", self)
        if self.epochs and self.count == 1:
            raise InvalidInput(
                f"run: round-epochs must come with rounds of at least 2, got {self.epochs} epochs "
                "and 1 round; --rounds 2 makes two, --recipe standard has neither"
            )
        if self.along != "factor" and self.count == 1:
            raise InvalidInput(
                f"run: round-shape must come with rounds of at least 2, got {self.along} and 1 "
                "round; --rounds 2 makes two"
            )
        ends = [0.0, *self.split, 1.0]
        if self.split and (len(ends) != self.count + 1 or ends != sorted({*ends})):
            raise InvalidInput(
                f"run: round-split must be {self.count - 1} rising numbers in (0, 1), one for each "
                f"of the {self.count} rounds but the last, got {list(self.split)}"
            )
        if self.masks and not self.epochs:
            raise InvalidInput(
                "run: round-masks must come with round-epochs of at least 1, got 0; without "
                "teaching in between every round finds the same scores"
            )


@dataclass(frozen=True)
class RunConfig:
    """Prune a Vision Transformer and distil what is left: the whole chain in one folder.

    The recipe says which steps that takes, and brings settings. `fast`, the default, leaves units
    out in rounds while the rest learns, cuts once, refits what stays and teaches it. `standard`:
    data, dense, score, plan, prune, sweep, distill, evaluate, report, or other steps in between
    with --gates, --mask-macs or --rounds. The same command on the same folder resumes after the
    last finished step, inside training at the last checkpoint.
    """

    recipe: Annotated[str, arg(metavar="NAME")] = "standard"
    """List of steps with settings: `fast`; `one-shot`, which trains nothing after the cut;
    `standard`, which the flags alone choose; or a published method: `kd-cnn`, `width-depth`,
    `manifold`, `manifold-full`, `auto-ratio`, `fixed-ratio`, `unified`."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/digits")
    """Run folder: everything the run makes, and what it needs to resume."""
    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=ModelConfig)
    data: Annotated[DataConfig, arg(name="")] = field(default_factory=DataConfig)
    score: Annotated[ScoreConfig, arg(name="")] = field(default_factory=ScoreConfig)
    plan: Annotated[PlanConfig, arg(name="")] = field(default_factory=PlanConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    """How `auto-ratio` and `fixed-ratio` find their ratios, in place of a budget."""
    sweep: Annotated[SweepConfig, arg(name="")] = field(default_factory=SweepConfig)
    rounds: Annotated[RoundConfig, arg(name="")] = field(default_factory=RoundConfig)
    gates: Annotated[GateConfig, arg(name="")] = field(default_factory=GateConfig)
    masks: Annotated[MaskConfig, arg(name="")] = field(default_factory=MaskConfig)
    teachers: Annotated[TeacherConfig, arg(name="")] = field(default_factory=TeacherConfig)
    student: Annotated[StudentConfig, arg(name="")] = field(default_factory=StudentConfig)
    train_dense: bool = False
    """Train the dense model here first, unless its weights are given; those that timm has for it
    learn the data, where they know other classes."""
    dense: DistillConfig = field(default_factory=lambda: DistillConfig(lr=1e-3))
    """How the dense model is trained, if it is (its teacher settings mean nothing)."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """How the pruned model is taught, after what stays was refitted."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """All randomness of the run is derived from this number."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    dtype: Precision = "auto"
    """What every step computes in; auto: bfloat16 on a GPU that has it, float32 elsewhere. A
    training whose own dtype is auto has this one."""
    threads: Threads = None
    latency_seconds: Annotated[float, arg(metavar="SECONDS")] = 1.0
    """How long each latency is measured; two models at batch 1 and 64 make four of them."""
    tensorboard: bool = False
    """Also write the curves for TensorBoard, into the run folder's `tensorboard/`."""
    quiet: bool = False
    """Print only the result and errors."""
    allow_config_change: bool = False
    """Resume although the configuration differs; the change is recorded, finished steps stay."""
    allow_chance: bool = False
    """Go on with a dense model that validation images show to be no better than chance."""

    @property
    def scoring(self) -> ScoreConfig:
        """How units are scored; of the kinds that are cut if no others are named."""
        return replace(self.score, units=self.score.units or self.plan.units)

    @property
    def has_weights(self) -> bool:
        """Whether the dense model comes with weights."""
        return self.model.origin != "random"

    def budget(self) -> dict[str, Any]:
        """What the smaller model may cost, as the keyword `vp.Budget` takes, whoever chooses it.

        Raises:
            InvalidInput: options that do not go together.
        """
        gated, masked = self.gates.kind != "none", self.masks.macs is not None
        if not gated and not masked:
            return self.plan.budget()
        # what gates leave is ranked by them, and their plan takes these two
        name, taken = ("gates", ("min_units", "round_to")) if gated else ("mask-macs", ())
        unset = PlanConfig()
        clash = ["mask-macs"] if gated and masked else []
        clash += [
            each.name.replace("_", "-")
            for each in fields(unset)
            if each.name not in taken and getattr(self.plan, each.name) != getattr(unset, each.name)
        ]
        clash += ["rounds"] if self.rounds.count > 1 else []
        if clash:
            amount = f"{'gate-macs' if gated else name} says how much stays"
            fix = "--recipe standard has none" if clash[0] == "rounds" else amount
            raise InvalidInput(f"run: {clash[0]} must not be given with {name}, got both; {fix}")
        return {"macs": self.gates.macs if gated else self.masks.macs}
