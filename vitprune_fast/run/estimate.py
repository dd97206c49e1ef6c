"""What a run would read and compute, step by step, and how long that takes on an assumed machine.

Nothing is read but the sizes of models and of the data, and nothing is computed: models have no
memory for their weights here. What is taken for granted is said in words, see ``Machine.words``.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast import files
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import PlanConfig, RunConfig
from vitprune_fast.config.yamlfile import from_plain
from vitprune_fast.data import ImageData
from vitprune_fast.data.photographs import Photographs
from vitprune_fast.data.splits import validation_counts
from vitprune_fast.distill.teachers import must_learn
from vitprune_fast.errors import InfeasibleBudget
from vitprune_fast.models.open import skeleton
from vitprune_fast.planning import Cost, cost, predict_cost
from vitprune_fast.planning.cost import count_macs
from vitprune_fast.run import actions
from vitprune_fast.run import steps as do
from vitprune_fast.run.inputs import student_config, trains_dense
from vitprune_fast.run.step import Step
from vitprune_fast.run.training import mask_schedule
from vitprune_fast.scoring import Scores, scored_axes
from vitprune_fast.scoring.criterion import criterion_named
from vitprune_fast.search import most_evaluations
from vitprune_fast.stated import stated_config
from vitprune_fast.structure import describe

RATES = Path(__file__).with_name("rates.json")
"""What a core reads, of the committed measurement; written by bench/table.py."""

# of the dense model, for each image: bench/results, "A sweep over its images"
SWEEP_FORWARDS = 2.5
# images whose bytes are looked at
_SAMPLED = 64


@dataclass(frozen=True)
class DataSizes:
    """What is known of a data set before any image is read.

    Attributes:
        images: split -> how many.
        classes: one entry per class.
        channels: of an image.
        image_size: (height, width) as the model gets it.
        image_bytes: of a file, the mean; 0 for images that lie in memory.
        origin: where the numbers come from, in words.
    """

    images: Mapping[str, int]
    classes: Sequence[Any]
    channels: int
    image_size: tuple[int, int]
    image_bytes: float
    origin: str

    @staticmethod
    def of(data: ImageData) -> DataSizes:
        """Those of a data set that was opened; a few files say how large they are."""
        total, count = 0, min(_SAMPLED, len(data.source.names))
        if isinstance(data.source, Photographs):
            for number in range(count):
                with data.source.open(number * len(data.source.names) // count) as file:
                    total += len(file.read())
        return DataSizes(
            {name: len(ids) for name, ids in data.split_ids.items()},
            data.classes,
            data.channels,
            data.image_size,
            total / count,
            f"of {data.name}",
        )

    @staticmethod
    def of_imagenet(
        channels: int, image_size: tuple[int, int], validation: float | None = None
    ) -> DataSizes:
        """Those of ILSVRC 2012 as class folders, with what its authors hold out as the test split.

        Its two archives are 147,897,477,120 and 6,744,924,160 bytes.
        """
        whole, test = 1_281_167, 50_000
        # classes have about as many images each
        sizes = dict.fromkeys(range(1000), whole // 1000)
        chosen = sum(validation_counts(sizes, validation)[0].values())
        return DataSizes(
            {"train": whole - chosen, "validation": chosen, "test": test},
            range(1000),
            channels,
            image_size,
            (147_897_477_120 + 6_744_924_160) / (whole + test),
            "of ImageNet-1k, as --data names none",
        )


@dataclass(frozen=True)
class Machine:
    """What a run is estimated for.

    Attributes:
        device: its name.
        flops: operations per second that its maker states for 16 bits.
        used: share of them that a training reaches.
        cores: that read images, per device.
        images_per_s_per_core: path of `bench data` -> images.
        measured: where these come from, in words.
    """

    device: str
    flops: float
    used: float
    cores: int
    images_per_s_per_core: Mapping[str, float]
    measured: str

    @staticmethod
    def assumed() -> Machine:
        """An H100 with 16 cores, each of which reads what was measured of one."""
        rates = files.read_json(RATES)
        measured = f"{rates['processor']}, {rates['source']}"
        return Machine("H100", 989e12, 0.4, 16, rates["images_per_s_per_core"], measured)

    def words(self) -> dict[str, str]:
        """Topic -> what an estimate takes for granted."""
        rates = ", ".join(
            f"{rate:,.0f} {path}" for path, rate in self.images_per_s_per_core.items()
        )
        return {
            "device": f"{self.used:.0%} of the {self.flops / 1e12:,.0f} TFLOP/s that the maker of "
            f"an {self.device} states for 16 bits without sparsity: an assumption, as no time of "
            "a GPU is committed yet",
            "reading": f"{self.cores} cores for each GPU (--workers {self.cores}), an assumption, "
            "of as many images/s as one was measured to read of photographs of 500 x 375 pixels "
            f"({rates}; {self.measured})",
            "work": "a training step is three forwards of the student and one of each teacher, "
            "scoring a forward and a backward to the inputs, and a sweep "
            f"{SWEEP_FORWARDS:g} forwards; what is slower of device and reading counts; the "
            "smaller model is what a plan of equal scores leaves; losses, optimizer, checkpoints, "
            "exchange between GPUs and latencies are left out",
        }


@dataclass(frozen=True)
class Reading:
    """Images of one split that a step reads, and what is computed of each.

    Attributes:
        split: they are of.
        images: how many are read, by all processes together.
        macs: multiply-accumulates for each, of all models and passes.
        path: of `bench data`; empty for images that lie in memory.
    """

    split: str
    images: float
    macs: float
    path: str

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """Of one device, and of the cores that read for it."""
        device = self.images * 2 * self.macs / (machine.flops * machine.used)
        if not self.path:
            return device, 0.0
        return device, self.images / (machine.cores * machine.images_per_s_per_core[self.path])


@dataclass(frozen=True)
class StepEstimate:
    """What one step comes to.

    Attributes:
        name: of the step.
        shared: whether several processes share its work.
        readings: what it reads.
        model: that it works on or makes; None where there is none.
        known: False for a step of the caller's own.
    """

    name: str
    shared: bool
    readings: tuple[Reading, ...] = ()
    model: Cost | None = None
    known: bool = True

    def images(self, split: str) -> int:
        """Images of a split that are read, by all processes together."""
        return round(sum(each.images for each in self.readings if each.split == split))

    def hours(self, machine: Machine, devices: int) -> float:
        """On so many devices; what is not shared is done by one of them."""
        slower = sum(max(each.seconds(machine)) for each in self.readings)
        return slower / (devices if self.shared else 1) / 3600

    def waits_for(self, machine: Machine) -> str:
        """What takes longer, ``device`` or ``images``; empty where nothing is read."""
        if not self.readings:
            return ""
        taking = max(self.readings, key=lambda each: max(each.seconds(machine)))
        device, reading = taking.seconds(machine)
        return "images" if reading > device else "device"


def estimate(
    config: RunConfig, steps: Sequence[Step], dense: nn.Module, sizes: DataSizes
) -> list[StepEstimate]:
    """What every step of a run comes to.

    Args:
        config: of the run.
        steps: in order.
        dense: the dense model, with or without memory for its weights.
        sizes: of the data.
    """
    walk = _Walk(config, dense, sizes)
    return [walk.past(step) for step in steps]


def kept_for_backward(model: nn.Module, input_size: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a forward of one image keeps for its backward, weights not counted."""
    bare = copy.deepcopy(model).to("meta").to(dtype).train()
    weights = {parameter.untyped_storage()._cdata for parameter in bare.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            # held, so that no other takes its place
            kept[storage._cdata] = storage
        return tensor

    # of two, since one image is not copied where several are
    images = torch.zeros(2, *input_size, device="meta", dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bare(images)
    return sum(storage.nbytes() for storage in kept.values()) // 2


Found = tuple[Cost | None, list[Reading]]


@dataclass
class _Walk:
    """Goes through the steps, and knows what the models and plans in the folder will cost."""

    config: RunConfig
    dense: nn.Module
    sizes: DataSizes
    # file of the run folder -> cost of the model, or of what the plan leaves
    costs: dict[str, Cost] = field(default_factory=dict)

    def past(self, step: Step) -> StepEstimate:
        """What a step comes to."""
        handlers: dict[Any, Callable[[RunConfig, Step], Found]] = {
            do.dense: self._dense,
            do.teacher: self._teacher,
            do.student: self._student,
            do.score: self._score,
            do.plan: self._plan,
            do.search: self._search,
            do.prune: self._prune,
            do.sweep: self._sweep,
            do.distill: self._distill,
            do.distill_behind_mask: self._distill_behind_mask,
            do.distill_masked: self._distill_masked,
            do.learn_gates: self._learn_gates,
            do.evaluate: self._evaluate,
            do.data: lambda own, step: (None, []),
            do.report: lambda own, step: (None, []),
        }
        handler = handlers.get(inspect.unwrap(step.function))
        if handler is None:
            return StepEstimate(step.name, step.shared, known=False)
        model, readings = handler(from_plain(dict(step.settings), self.config), step)
        return StepEstimate(step.name, step.shared, tuple(readings), model)

    def _dense(self, own: RunConfig, step: Step) -> Found:
        made = self.costs[step.outputs["model"]] = cost(self.dense)
        if not trains_dense(own, self.sizes):
            return made, [self._read("validation", self.sizes.images["validation"], made.macs)]
        return made, self._training(own.dense, made.macs, 0)

    def _teacher(self, own: RunConfig, step: Step) -> Found:
        name = own.teachers.names[int(step.name.rpartition("-")[2])]
        made = self._other(own, name)
        learns = must_learn(name, len(self.sizes.classes), pretrained=own.teachers.pretrained)
        if own.teachers.checkpoint(name) or not learns:
            return made, []
        settings = DistillConfig(epochs=own.teachers.epochs, lr=own.teachers.lr, alpha=0)
        return made, self._training(settings, made.macs, 0)

    def _student(self, own: RunConfig, step: Step) -> Found:
        made = cost(skeleton(student_config(own.student, self.sizes)))
        self.costs[step.outputs["model"]] = made
        return made, []

    def _score(self, own: RunConfig, step: Step) -> Found:
        model, config = self.costs[step.inputs["model"]], own.scoring
        asked = criterion_named(config.criterion)
        if asked.of_weights is not None:
            return model, []
        forwards = 1.0 + (config.draws if asked.gradients else 0)
        if config.criterion in ("loss", "kl"):
            # a unit left out costs what comes after it, half of the model on average
            units = sum(axis.size for axis in scored_axes(describe(self.dense), config.units))
            forwards += units / 2
        return model, [self._train_images(config.samples, forwards * model.macs)]

    def _plan(self, own: RunConfig, step: Step) -> Found:
        left = self._planned(own.plan, self.costs[step.inputs["model"]])
        self.costs[step.outputs["plan"]] = left
        return left, []

    def _search(self, own: RunConfig, step: Step) -> Found:
        model, config = self.costs[step.inputs["model"]], own.search
        # how much goes is what it is to find
        plan = own.plan if config.macs is None else PlanConfig(macs=config.macs)
        left = model if config.macs is None else self._planned(plan, model)
        self.costs[step.outputs["plan"]] = left
        tried = most_evaluations(config, len(own.plan.units))
        images = min(config.images or math.inf, self.sizes.images["validation"])
        return left, [self._read("validation", tried * images, model.macs)]

    def _prune(self, own: RunConfig, step: Step) -> Found:
        made = self.costs[step.outputs["pruned"]] = self.costs[step.inputs["plan"]]
        return made, []

    def _sweep(self, own: RunConfig, step: Step) -> Found:
        model = self.costs[step.inputs["model"]]
        made = self.costs[step.outputs["swept"]] = self.costs[step.inputs["plan"]]
        return made, [self._train_images(own.sweep.images, SWEEP_FORWARDS * model.macs)]

    def _distill(self, own: RunConfig, step: Step) -> Found:
        student = self.costs[step.outputs["model"]] = self.costs[step.inputs["student"]]
        return student, self._training(own.distill, student.macs, self._teaching(own, step))

    def _distill_behind_mask(self, own: RunConfig, step: Step) -> Found:
        self.costs[step.outputs["model"]] = self.costs[step.inputs["student"]]
        live = self.costs[step.inputs["plan"]]
        return live, self._training(own.distill, live.macs, self._teaching(own, step))

    def _distill_masked(self, own: RunConfig, step: Step) -> Found:
        whole = self.costs[step.outputs["model"]] = self.costs[step.inputs["dense"]]
        schedule = mask_schedule(own.masks)
        assert schedule is not None
        self.costs[step.outputs["plan"]] = _share(whole, schedule.macs)
        steps = own.distill.epochs * math.ceil(
            self.sizes.images["train"] / (own.data.batch_size * own.distill.accumulate)
        )
        shares = [schedule.share(number, steps) for number in range(steps)]
        changes = sum(one != other for one, other in zip([1.0, *shares], shares, strict=False))
        live = _share(whole, sum(shares) / steps)
        return live, [
            *self._training(own.distill, live.macs, self._teaching(own, step)),
            self._train_images(changes * schedule.samples, 2 * whole.macs),
        ]

    def _learn_gates(self, own: RunConfig, step: Step) -> Found:
        whole = self.costs[step.outputs["model"]] = self.costs[step.inputs["dense"]]
        self.costs[step.outputs["plan"]] = _share(whole, own.gates.macs)
        settings = DistillConfig(epochs=own.gates.epochs, alpha=own.distill.alpha)
        readings = self._training(settings, whole.macs, self._teaching(own, step))
        if own.gates.kind in ("ste", "fixed"):
            readings.append(self._train_images(own.score.samples, 2 * whole.macs))
        return whole, readings

    def _evaluate(self, own: RunConfig, step: Step) -> Found:
        macs = sum(self.costs[name].macs for name in step.inputs.values())
        return None, [self._read("test", self.sizes.images["test"], macs)]

    def _training(self, config: DistillConfig, student: float, teachers: float) -> list[Reading]:
        """A training, which is validated after each epoch, and before the first to choose."""
        path = "RandAugment" if self.config.data.policy else "training"
        validated = student + (teachers if config.learns_logits else 0)
        images = self.sizes.images
        return [
            self._read("train", config.epochs * images["train"], 3 * student + teachers, path),
            self._read(
                "validation", (config.epochs + config.chooses) * images["validation"], validated
            ),
        ]

    def _train_images(self, count: int, macs: float) -> Reading:
        """Training images as evaluation sees them, of which there may be fewer."""
        return self._read("train", min(count, self.sizes.images["train"]), macs)

    def _read(self, split: str, images: float, macs: float, path: str = "evaluation") -> Reading:
        return Reading(split, images, macs, path if self.sizes.image_bytes else "")

    def _teaching(self, own: RunConfig, step: Step) -> float:
        """Multiply-accumulates of all teachers for one image."""
        if not own.distill.needs_teacher:
            return 0
        return sum(
            self.costs[step.inputs["dense"]].macs if name == "self" else self._other(own, name).macs
            for name in own.teachers.names or ("self",)
        )

    def _other(self, own: RunConfig, name: str) -> Cost:
        """Of a teacher by name, which may be of any family."""
        model: Any = skeleton(ModelConfig(name=name)).eval()
        size = stated_config(model).get("input_size", (self.sizes.channels, *self.sizes.image_size))
        if own.teachers.size is not None:
            size = (size[0], own.teachers.size, own.teachers.size)
        place = next(model.parameters())
        image = torch.zeros(1, *size, device=place.device)
        params = sum(parameter.numel() for parameter in model.parameters())
        macs = count_macs(lambda: model(image))
        return Cost(params, macs, macs)

    def _planned(self, config: PlanConfig, model: Cost) -> Cost:
        """What is left of a model by a plan in which all units are worth the same."""
        structure, whole = describe(self.dense), cost(self.dense)
        flat = {a.name: torch.zeros(a.size) for kind in config.units for a in structure.units(kind)}
        try:
            plan = actions.plan(self.dense, Scores(flat, "none", "mean", 0), config)
            left = predict_cost(structure, plan)
        except InfeasibleBudget:
            # only scores can tell which branches go
            limits = actions.limits(config, whole)
            macs = limits.get("macs", whole.macs)
            left = Cost(limits.get("params", whole.params), macs, macs)
        if config.macs is None and config.params is None and config.keep:
            # shares of units are those of the model that is cut
            return _share(model, left.macs / whole.macs)
        return min(left, model, key=lambda each: each.macs)


def _share(whole: Cost, share: float) -> Cost:
    """A model that is smaller by a factor."""
    macs = round(whole.macs * share)
    return Cost(round(whole.params * share), macs, macs)
