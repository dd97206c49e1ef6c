"""What a batch must be, and how it reaches a model: one answer for all who read batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from vitprune_fast.bare import head_width, stated_classes
from vitprune_fast.errors import InvalidInput
from vitprune_fast.ranks import Ranks
from vitprune_fast.stated import misfit

# images, labels, ids
Batch = tuple[Tensor, Tensor, Tensor]
# what is read beside the images: numbers of classes; whatever a loss compares with the outputs, one
# row per image; or nothing, where batches may be images alone
Targets = Literal["labels", "any", "none"]
# what images and targets are called where a batch names them: by transformers, and by datasets
_NAMES = (("pixel_values", "images", "image", "img"), ("labels", "label"))
# what functions call a loss of other targets than labels
_LOSSES = {"score": "loss", "evaluate": "loss", "distill": "target_loss"}
# number of a batch, or places of samples in the order of an epoch
Which = int | Sequence[int]


@runtime_checkable
class Numbered(Protocol):
    """Batches that can be read one by one, so that each process reads its own; `data.Loader`."""

    def __len__(self) -> int: ...

    def read(self, epoch: int, numbers: Sequence[Which], device: torch.device) -> Iterator[Batch]:
        """Some batches of an epoch, or its samples at some places, and no others.

        Yields:
            Images ``(B, C, H, W)`` on the device, labels ``(B,)`` and ids ``(B,)`` int64 on the
            CPU. Where an image could not be read its pixels are NaN and its id is -1.
        """
        ...

    def labels(self, epoch: int, number: int) -> Tensor:
        """The labels of a batch, none of whose images is read for it."""
        ...

    def first(self, count: int) -> Numbered:
        """The first samples of epoch 0 alone, in the same batches."""
        ...

    def share(self, ranks: Ranks) -> None:
        """Make the images that any process could not read known to all; all of them call."""
        ...


def readable(batch: Batch) -> Batch:
    """A batch of :class:`Numbered` without the images that could not be read."""
    images, labels, ids = batch
    there = ids >= 0
    if there.all():
        return batch
    return images[there.to(images.device)], labels[there], ids[there]


def own(
    function: str,
    batches: Any,
    ranks: Ranks,
    device: torch.device,
    *models: nn.Module | None,
    targets: Targets = "labels",
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of this process' batches; of batches without numbers, all.

    Args:
        function: the caller's name, for the error sentence.
        batches: yields (images, labels, ...).
        ranks: the processes that share them.
        device: where images are wanted; those of batches without numbers come where they are.
        models: that will see the images; None is nobody.
        targets: what is read beside the images.

    Raises:
        InvalidInput: as :func:`checked`.
    """
    if not isinstance(batches, Numbered):
        yield from checked(function, batches, *models, targets=targets)
        return
    for batch in batches.read(0, ranks.share_of(len(batches)), device):
        images, labels = unpack(function, readable(batch), *models)
        if len(labels):
            yield images, labels


def checked(
    function: str,
    batches: Iterable[Any],
    *models: nn.Module | None,
    targets: Targets = "labels",
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of every batch, checked before a model sees them.

    Args:
        function: the caller's name, for the error sentence.
        batches: yields (images, labels, ...); without targets also images, or is a tensor of them.
        models: that will see the images; None is nobody.
        targets: what is read beside the images.

    Yields:
        As :func:`unpack` returns.

    Raises:
        InvalidInput: as :func:`unpack`, or ``batches`` cannot be iterated.
    """
    if targets == "none" and isinstance(batches, Tensor):
        batches = [batches]
    what = "images" if targets == "none" else "(images, labels)"
    for batch in _iterated(function, "batches", batches, what):
        yield unpack(function, batch, *models, targets=targets)


def unpack(
    function: str, batch: Any, *models: nn.Module | None, targets: Targets = "labels"
) -> tuple[Tensor, Tensor]:
    """The images and labels of one batch that may carry more.

    Args:
        function: the caller's name, for the error sentence.
        batch: (images ``(B, C, H, W)`` floating, labels: B integers in a list or tensor, ...), or
            a mapping that names them, such as the ``pixel_values`` and ``labels`` of transformers.
        models: that will see the images; None is nobody.
        targets: what is read beside the images. ``any``: labels, or numbers ``(B, ...)``; ``none``:
            the batch may be images alone.

    Returns:
        Images as they came, and labels ``(B,)`` int64, or targets as they came; zeros for images
        alone. Neither is a tensor of inference mode, of which autograd can keep nothing.

    Raises:
        InvalidInput: the batch is something else, or a model that states the size of its images
            takes others.
    """
    parts = _parts(batch)
    if targets == "none" and len(parts) == 1:
        images = _images(function, parts[0], *models)
        return images, torch.zeros(len(images), dtype=torch.int64)
    if isinstance(batch, Tensor) or len(parts) < 2:
        raise InvalidInput(
            f"{function}: batches must yield (images, labels) pairs, or name them pixel_values and "
            f"labels, got {_kind(batch)}"
        )
    images = _images(function, parts[0], *models)
    if targets == "any":
        return images, _targets(function, parts[1], len(images))
    return images, _labels(function, parts[1], len(images))


def unlabelled(function: str, argument: str, batches: Any, *models: nn.Module) -> Iterator[Tensor]:
    """The images of every batch, whatever else it carries.

    Args:
        function: the caller's name, for the error sentence.
        argument: as above, that of ``batches``.
        batches: yields images ``(B, C, H, W)`` floating, or sequences that begin with them, or
            mappings that name them; or one tensor of images.
        models: that will see the images.

    Raises:
        InvalidInput: something else, or a model that states the size of its images takes others.
    """
    if isinstance(batches, Tensor):
        batches = [batches]
    for batch in _iterated(function, argument, batches, "batches of images"):
        yield _images(function, next(iter(_parts(batch)), batch), *models)


def check_whole(function: str, batches: Any, ranks: Ranks) -> None:
    """Refuse batches that give a process its own part, where the processes share them.

    Args:
        function: the caller's name, for the error sentence.
        batches: as :func:`own` takes them.
        ranks: the processes.

    Raises:
        InvalidInput: a sampler of torch gives each process a part of its own.
    """
    samplers = (batches, *(getattr(batches, name, None) for name in ("sampler", "batch_sampler")))
    samplers = (*samplers, getattr(samplers[-1], "sampler", None))
    if ranks.world > 1 and any(isinstance(each, DistributedSampler) for each in samplers):
        raise InvalidInput(
            f"{function}: batches must be the whole stream in every process, which share them, "
            "got a DistributedSampler, by which each sees its own part; leave the sampler out"
        )


def alike(
    function: str, batches: Any, found: Iterator[tuple[Tensor, Tensor]], ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor]]:
    """What was found, after all processes said that theirs begins alike and is as long.

    Args:
        function: the caller's name, for the error sentence.
        batches: that it was found in, with a length or without.
        found: images and targets, of which the first are compared.
        ranks: the processes; all of them call.

    Raises:
        StageFailed: they are not the same.
    """
    if ranks.world == 1:
        yield from found
        return
    error, first, seen = None, None, "an error"
    try:
        first = next(found, None)
        digest = hashlib.blake2b(digest_size=8)
        for tensor in first or ():
            raw = tensor.detach().cpu().contiguous().view(torch.uint8)
            digest.update(raw.numpy().tobytes())
        count = len(batches) if hasattr(batches, "__len__") else "some"
        seen = f"{count} batches that begin with {digest.hexdigest()}"
    # the others have to know, or they would wait for this process for ever
    except Exception as caught:
        error = caught
    if error is not None:
        ranks.texts(seen)
        raise error
    ranks.agree(
        seen,
        f"{function}: batches must be the same in every process, which share them",
        "give each of them the whole stream, in one order",
    )
    if first is not None:
        yield first
    yield from found


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Images on the device and in the floating dtype of the model's parameters."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    return images if weight is None else images.to(weight.device, weight.dtype)


def logits_of(output: Any) -> Any:
    """What a model says of its images: what it returns, or the ``.logits`` of that.

    Of a backbone of transformers, which has none, the last hidden states of all tokens.
    """
    return getattr(output, "logits", getattr(output, "last_hidden_state", output))


def features_of(output: Any) -> Any:
    """What a model without a classifier says of its images: what it returns, or what it pooled.

    The outputs of transformers' models hold several things: pooled features come before tokens.
    """
    for name in ("logits", "pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output


def classes_of(model: nn.Module) -> Any:
    """How many classes a model tells apart, by its head, or as it says; None where neither does."""
    width = head_width(model)
    return stated_classes(model) if width is None else width


def check_logits(
    function: str, logits: Tensor, labels: Tensor, model: nn.Module | None = None
) -> None:
    """Refuse logits that are not one row per label, and labels they have no class for.

    Args:
        function: the caller's name, for the error sentence.
        logits: what the model returned.
        labels: ``(B,)`` int64.
        model: that returned them, and may say that they are of other classes, or features.

    Raises:
        InvalidInput: as said.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        raise InvalidInput(
            f"{function}: model must give logits ({len(labels)}, classes), got {_shown(logits)}; "
            "a timm model without pooling needs global_pool='token' or 'avg'"
        )
    classes = None if model is None else classes_of(model)
    if isinstance(classes, int) and classes != logits.shape[1]:
        raise InvalidInput(
            f"{function}: model must give logits of the {classes} classes that it says it has, got "
            f"{logits.shape[1]}; set its num_classes, or give it a classifier of so many"
        )
    check_labels(function, labels, logits.shape[1])


def check_features(function: str, features: Any, samples: int) -> None:
    """Refuse features that are not numbers ``(samples, ...)``.

    Args:
        function: the caller's name, for the error sentence.
        features: of :func:`features_of`.
        samples: that went in.

    Raises:
        InvalidInput: as said.
    """
    if isinstance(features, Tensor) and features.ndim > 1 and len(features) == samples:
        return
    raise InvalidInput(
        f"{function}: model must give features ({samples}, ...) for the objective 'features', got "
        f"{_shown(features)}"
    )


def check_labels(function: str, labels: Tensor, classes: int) -> None:
    """Refuse labels that the model has no class for.

    Args:
        function: the caller's name, for the error sentence.
        labels: ``(B,)`` int64.
        classes: of the model.

    Raises:
        InvalidInput: as said.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InvalidInput(
            f"{function}: labels must lie in 0..{classes - 1} like the classes of the model, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )


def _iterated(function: str, argument: str, batches: Any, what: str) -> Iterator[Any]:
    if isinstance(batches, Mapping):
        raise InvalidInput(
            f"{function}: {argument} must be an iterable of {what}, got {_kind(batches)}; a single "
            "batch goes into a list"
        )
    can = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, str) or not can:
        shown = type(batches).__name__
        raise InvalidInput(f"{function}: {argument} must be an iterable of {what}, got {shown}")
    return iter(batches)


def _parts(batch: Any) -> Sequence[Any]:
    """What a batch holds: images, targets and more; nothing where it is no batch."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping):
        found = [[batch[name] for name in names if name in batch][:1] for names in _NAMES]
        return [*found[0], *found[1]] if found[0] else ()
    return batch if isinstance(batch, Sequence) and not isinstance(batch, str) else ()


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} with {', '.join(map(str, batch)) or 'nothing'}"
    shown = type(batch).__name__
    alone = isinstance(batch, str) or not isinstance(batch, Sequence)
    return shown if alone else f"{shown} of length {len(batch)}"


def _images(function: str, images: Any, *models: nn.Module | None) -> Tensor:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        hint = ""
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            hint = "; take images / 255, minus the mean and divided by the std of the training"
        raise InvalidInput(
            f"{function}: images must be a floating tensor (B, C, H, W), got {_shown(images)}{hint}"
        )
    for model in models:
        rule = "" if model is None else misfit(model, images.shape[1:])
        if rule:
            raise InvalidInput(
                f"{function}: images must be (B, {rule}) like the model takes them, "
                f"got {tuple(images.shape)}"
            )
    # made in inference mode: autograd keeps a copy of it, and nothing of the tensor itself
    return images.clone() if images.is_inference() else images


def _targets(function: str, given: Any, count: int) -> Tensor:
    rule = f"{function}: targets must be numbers ({count}, ...), one row per image"
    found = _tensor(rule, given)
    if found.ndim < 1 or len(found) != count or found.is_complex():
        raise InvalidInput(f"{rule}, got {_shown(found)}")
    return found


def _labels(function: str, labels: Any, count: int) -> Tensor:
    rule = f"{function}: labels must be {count} class numbers, one per image"
    found = _tensor(rule, labels)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    # an empty list has no kind
    if found.shape != (count,) or not (whole or not count):
        hint = ""
        if function in _LOSSES and found.ndim == 2 and len(found) == count:
            hint = (
                f"; take labels.argmax(1) of one-hot rows, or say {_LOSSES[function]}='bce' for "
                "several labels an image"
            )
        raise InvalidInput(f"{rule}, got {_shown(found)}{hint}")
    return found.long()


def _tensor(rule: str, given: Any) -> Tensor:
    """What was given as a tensor of which autograd can keep something."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInput(f"{rule}, got {type(given).__name__}: {error}") from None
    return found.clone() if found.is_inference() else found


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__
