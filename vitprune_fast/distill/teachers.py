"""Frozen models that see the student's own augmented crop, as they want to see it.

Dimensions: ``B`` images, ``C`` classes or channels, ``N`` tokens, ``D`` width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprune_fast.bare import inside
from vitprune_fast.batches import as_input, classes_of
from vitprune_fast.distill.hidden_states import pooled_of
from vitprune_fast.distill.image_conversion import Conversion
from vitprune_fast.distill.losses._base import Reads, Seen
from vitprune_fast.errors import InvalidInput, VitpruneError
from vitprune_fast.modules.behaviour import check_behaviour
from vitprune_fast.modules.modes import compiled, evaluating
from vitprune_fast.sealed import fingerprint
from vitprune_fast.stated import fixed_size, image_channels, stated_config
from vitprune_fast.wide import wide

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Teacher(nn.Module):
    """A frozen model that answers for the student's augmented, normalised crop.

    Images come normalised for the student and are turned into what the teacher was trained on:
    ``x_T = (x_S * std_S + mean_S - mean_T) / std_T`` per channel, then resized (bicubic,
    antialiased) where the teacher takes one size only or ``image_size`` says so. Both maps are
    affine in the pixels, so they may follow mixup and cutmix: student and teacher see one crop.
    A grey image is repeated for a teacher that wants three channels. The forward runs once per
    call, whatever the number of losses that read it, in evaluation mode (BatchNorm and dropout
    included) and without gradients. timm's ``DistillationTeacher`` normalises the same way; it
    handles neither sizes nor states, and compares its constants on the device in every step.

    The model stays the caller's: modes are put back after every forward, also when ``train()`` is
    called on this or a module that holds it, and ``requires_grad`` is never touched: the forward
    runs under ``no_grad``. With ``dtype`` or ``channels_last`` a converted copy answers in its
    place, and later changes to the model do not reach it.

    Args:
        model: maps images to logits ``(B, C)``; as it is, compiled, or wrapped by FSDP2.
        student_mean: per channel, what the images were normalised with; None converts nothing.
        student_std: as above, above 0.
        mean: what the teacher wants; default: that of its ``pretrained_cfg`` if it fits its
            channels, else the student's. Give the student's for weights trained on the same data
            by someone who did not write this down.
        std: as above.
        image_size: (height, width) or one number for both; default: the one size a model with
            position embeddings takes, and for any other the student's.
        dtype: of the weights; None leaves them.
        channels_last: memory format of weights and images, faster for a CNN on tensor cores.
        compile: whether to run through ``torch.compile``; a text names its backend.
        blocks: numbers of blocks whose states come back, see ``HiddenStates``.
        features: whether pooled features come back.
        weight: of this teacher among several; the objective reads it.
        name: in logs and ``TeacherSet``; default: the model's class.

    Raises:
        InvalidInput: a value that cannot be used, or a sharded model that would have to be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        student_mean: Sequence[float] | None = None,
        student_std: Sequence[float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        compile: bool | str = False,
        blocks: Sequence[int] = (),
        features: bool = False,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InvalidInput(f"Teacher: model must be a module, got {type(model).__name__}")
        if not (math.isfinite(weight) and weight >= 0):
            raise InvalidInput(f"Teacher: weight must be finite and at least 0, got {weight}")
        inner: Any = inside(model)
        self.channels_last = channels_last
        self.model = _converted(model, dtype, channels_last)
        # our own copy stays in evaluation mode, so that its modes need not be set in every step
        self._borrowed = (model,) if self.model is model else ()
        self.weight, self.name = weight, name or type(inner).__name__
        self.convert = Conversion(
            inner, (student_mean, student_std), (mean, std), image_size, self.name
        )
        self._runner = (compiled(self.model, compile) if compile else self.model,)
        self.record(Reads(tuple(blocks), features=features))
        self.training = False

    def record(self, reads: Reads) -> None:
        """Change what comes back besides the logits, see ``HiddenStates``.

        Raises:
            InvalidInput: the model has no such blocks, or nothing to read features from.
        """
        self._reads = reads
        self._hidden = reads.recorder(self._runner[0])

    def fingerprint(self) -> str:
        """Fingerprint of its weights; of a sharded model its name alone."""
        # after a forward the parameters of an FSDP2 module are whole ones, those of its state not
        if any(hasattr(tensor, "placements") for tensor in self.model.state_dict().values()):
            return self.name
        return fingerprint(self.model)

    def as_classifier(self) -> nn.Module:
        """This teacher as a module that gives logits alone, e.g. for ``evaluate``."""
        return _Classifier(self)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode; the model's own modes are its owner's."""
        return self

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Seen:
        """Answer for one batch.

        Args:
            images_BCHW: ``(B, C, H, W)`` floating, normalised for the student, augmented, mixed.

        Returns:
            Logits, fp32 (fp64 of an fp64 teacher), and what else was asked for, in its own dtype.

        Raises:
            InvalidInput: the channels do not fit, or the model gives no logits ``(B, C)``.
        """
        x = as_input(self.model, self.convert(images_BCHW))
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with evaluating(*self._borrowed), self._hidden or nullcontext():
            logits = pooled_of(self._runner[0](x))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InvalidInput(
                f"Teacher: {self.name} must give logits ({len(x)}, classes), got {shown}; a timm "
                "model without pooling needs global_pool='token' or 'avg'"
            )
        return Seen.of(wide(logits), self._reads, self._hidden)

    def check_student(self, student: nn.Module, *, logits: bool = True) -> None:
        """Refuse a student that this teacher cannot teach.

        Args:
            student: the model to be trained.
            logits: whether a loss compares logits, so that the classes must agree.

        Raises:
            InvalidInput: the student is the teacher or shares parameters with it, or one of them
                has other classes.
        """
        inner: Any = inside(student)
        learning = {id(parameter) for parameter in inner.parameters()}
        if inner is inside(self.model) or any(
            id(parameter) in learning for parameter in self.model.parameters()
        ):
            raise InvalidInput(
                f"Teacher: {self.name} must be another model than the student, got one that shares "
                "its weights and would chase itself; give copy.deepcopy(model)"
            )
        own, wanted = classes_of(inside(self.model)), classes_of(inner)
        if logits and None not in (own, wanted) and own != wanted:
            raise InvalidInput(
                f"Teacher: {self.name} must have {wanted} classes like the student, got {own}; "
                "train it on the student's data first"
            )

    def extra_repr(self) -> str:
        size = self.convert.image_size or "as the student"
        return f"name={self.name}, weight={self.weight}, image_size={size}"


class _Classifier(nn.Module):
    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.teacher(images_BCHW).logits_BC


class TeacherSet(nn.Module):
    """Several teachers of one student, e.g. the unpruned self and a CNN (NViT, CVPR 2023).

    Args:
        teachers: each with the name by which losses are assigned to it.

    Raises:
        InvalidInput: there is none, or two have one name.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        super().__init__()
        names = [teacher.name for teacher in teachers]
        if not names or len(set(names)) != len(names):
            raise InvalidInput(
                "TeacherSet: teachers must be at least one, with a name of its own each, got "
                f"{', '.join(names) or 'none'}"
            )
        self.teachers = nn.ModuleList(teachers)
        self.names = names

    def forward(self, images_BCHW: Tensor) -> dict[str, Seen]:
        """Ask every teacher once; answers by name, in the order of the teachers."""
        return {name: each(images_BCHW) for name, each in zip(self.names, self, strict=True)}

    def check_student(self, student: nn.Module, *, logits: bool = True) -> None:
        """Refuse a student that one of the teachers cannot teach, see ``Teacher``."""
        for teacher in self:
            teacher.check_student(student, logits=logits)

    def __len__(self) -> int:
        return len(self.teachers)

    def __iter__(self) -> Any:
        return iter(self.teachers)

    def __getitem__(self, name: str) -> Teacher:
        if name not in self.names:
            raise InvalidInput(
                f"TeacherSet: name must be one of {', '.join(self.names)}, got {name!r}"
            )
        teacher: Any = self.teachers[self.names.index(name)]
        return teacher


def resolve_teacher(
    source: str | Path | nn.Module,
    student: nn.Module,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    logits: bool = True,
    size: int | None = None,
    train: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> Teacher:
    """A teacher from whatever names one, checked against its student.

    Args:
        source: a ``Teacher``, taken as it is; a module; a folder written by ``vp.save``;
            ``"self"``, a copy of the student as it is now; or a model of timm.
        student: the model to be trained; a model of timm that is not ``pretrained`` gets its
            classes and channels.
        pretrained: whether a model of timm comes with the weights of its name; then it sees images
            in the size, mean and std they were trained on. Otherwise those of its name say nothing
            and the student's are taken, unless ``options`` say something else.
        checkpoint: weights for a model of timm, trained on the student's data: safetensors, or a
            torch file without code; then ``pretrained`` means nothing.
        logits: whether a loss compares logits, so that the classes must agree.
        size: height and width for a named teacher that takes any.
        train: trains what it is given on images as the student gets them. It is asked for a model
            of timm whose weights know other classes than the student, which then has the student's
            classes, channels and normalisation. None takes such a model as it is.
        **options: of ``Teacher``; None is the default of each.

    Raises:
        InvalidInput: no such model, or one that cannot teach this student.
        DamagedFile: the folder or checkpoint holds no whole model.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if checkpoint is not None and (
        isinstance(source, nn.Module) or source == "self" or Path(source).is_dir()
    ):
        shown = type(source).__name__ if isinstance(source, nn.Module) else source
        raise InvalidInput(
            f"distill: teacher-checkpoint must go with a model of timm, got it with {shown}, "
            "which has its weights"
        )
    if isinstance(source, Teacher):
        if options:
            raise InvalidInput(
                f"distill: options of a teacher must be given to the Teacher itself, got {options}"
            )
        teacher = source
    elif isinstance(source, nn.Module):
        teacher = Teacher(source, **options)
    else:
        inner = inside(student)
        try:
            teacher = _named(str(source), inner, pretrained, checkpoint, size, train, options)
        except VitpruneError as error:
            # of the model that is opened; the student's could be meant
            if not str(error).startswith("model: "):
                raise
            raise type(error)(f"Teacher: {str(error).removeprefix('model: ')}") from None
    teacher.check_student(student, logits=logits)
    return teacher


def _named(
    name: str,
    student: Any,
    pretrained: bool,
    checkpoint: str | Path | None,
    size: int | None,
    train: Callable[[nn.Module], Any] | None,
    options: dict[str, Any],
) -> Teacher:
    # a training whose teachers are given as modules needs none of the packages behind flags
    from vitprune_fast.config.model import ModelConfig
    from vitprune_fast.models.open import open_model

    options = {"name": Path(name).name, **options}
    same = {"mean": options.get("student_mean"), "std": options.get("student_std")}
    classes, learns = classes_of(student), False
    if name == "self":
        check_behaviour(student, "distill")
        model, options = copy.deepcopy(student), {**same, **options}
    elif Path(name).is_dir():
        model = open_model(ModelConfig(name=name))
    elif (
        pretrained
        and checkpoint is None
        and (train is None or not must_learn(name, classes, pretrained=True))
    ):
        model = open_model(ModelConfig(name=name, pretrained=True))
        stated = stated_config(model).get("input_size")
        options = {"image_size": stated and tuple(stated[1:]), **options}
    else:
        args = {"in_chans": image_channels(student) or 3, "num_classes": classes}
        learns = checkpoint is None
        weights = None if checkpoint is None else Path(checkpoint)
        config = ModelConfig(name, args, weights, pretrained=pretrained and learns)
        model, options = open_model(config), {**same, **options}
    if size is not None and fixed_size(model) is None:
        options["image_size"] = (size, size)
    if learns and train is not None:
        train(Resized(model, fixed_size(model) or options.get("image_size")))
    return Teacher(model, **options)


def must_learn(name: str, classes: int | None, *, pretrained: bool) -> bool:
    """Whether a model of timm has to learn so many classes before it can teach them.

    Args:
        name: of timm.
        classes: of the student.
        pretrained: whether it comes with the weights of its name.
    """
    stated = timm.models.get_pretrained_cfg(name)
    return not pretrained or stated is None or stated.num_classes != classes


class Resized(nn.Module):
    """A model behind the resizing that ``Teacher`` does, to be trained.

    Args:
        model: sees the resized images.
        size: (height, width) in pixels; None resizes nothing.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images ``(B, C, H, W)``."""
        if self.size not in (None, tuple(images.shape[2:])):
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images)


def _converted(model: nn.Module, dtype: torch.dtype | None, channels_last: bool) -> nn.Module:
    """The model, or a copy in another dtype or memory format."""
    if dtype is not None and dtype not in _DTYPES:
        raise InvalidInput(f"Teacher: dtype must be a floating dtype, got {dtype}")
    floating = [p for p in model.parameters() if p.is_floating_point()]
    if not channels_last and (dtype is None or all(p.dtype == dtype for p in floating)):
        return model
    if any(hasattr(p, "placements") for p in floating):
        raise InvalidInput(
            "Teacher: dtype and channels_last must be left alone for a sharded model, whose copy "
            f"would be another shard, got {dtype}; shard it with a MixedPrecisionPolicy"
        )
    check_behaviour(inside(model), "Teacher")
    copied = copy.deepcopy(inside(model)).requires_grad_(False).eval()
    copied = copied if dtype is None else copied.to(dtype)
    return copied.to(memory_format=torch.channels_last) if channels_last else copied
