"""What a batch must be, and how it reaches a model: one answer for all who read batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vitprune_fast.errors import InvalidInput
from vitprune_fast.ranks import Ranks
from vitprune_fast.stated import misfit

# images, labels, ids
Batch = tuple[Tensor, Tensor, Tensor]
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
    function: str, batches: Any, ranks: Ranks, device: torch.device, *models: nn.Module | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of this process' batches; of batches without numbers, all.

    Args:
        function: the caller's name, for the error sentence.
        batches: yields (images, labels, ...).
        ranks: the processes that share them.
        device: where images are wanted; those of batches without numbers come where they are.
        models: that will see the images; None is nobody.

    Raises:
        InvalidInput: as :func:`checked`.
    """
    if not isinstance(batches, Numbered):
        yield from checked(function, batches, *models)
        return
    for batch in batches.read(0, ranks.share_of(len(batches)), device):
        images, labels = unpack(function, readable(batch), *models)
        if len(labels):
            yield images, labels


def checked(
    function: str, batches: Iterable[Any], *models: nn.Module | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of every batch, checked before a model sees them.

    Args:
        function: the caller's name, for the error sentence.
        batches: yields (images, labels, ...).
        models: that will see the images; None is nobody.

    Yields:
        Images as they came, and labels ``(B,)`` int64.

    Raises:
        InvalidInput: as :func:`unpack`, or ``batches`` cannot be iterated.
    """
    for batch in _iterated(function, "batches", batches, "(images, labels)"):
        yield unpack(function, batch, *models)


def unpack(function: str, batch: Any, *models: nn.Module | None) -> tuple[Tensor, Tensor]:
    """The images and labels of one batch that may carry more.

    Args:
        function: the caller's name, for the error sentence.
        batch: (images ``(B, C, H, W)`` floating, labels: B integers in a list or tensor, ...).
        models: that will see the images; None is nobody.

    Returns:
        Images as they came, and labels ``(B,)`` int64.

    Raises:
        InvalidInput: the batch is something else, or a model that states the size of its images
            takes others.
    """
    if isinstance(batch, str) or not isinstance(batch, Sequence) or len(batch) < 2:
        shown = type(batch).__name__
        if isinstance(batch, Sequence) and not isinstance(batch, str):
            shown += f" of length {len(batch)}"
        raise InvalidInput(f"{function}: batches must yield (images, labels) pairs, got {shown}")
    images = _images(function, batch[0], *models)
    return images, _labels(function, batch[1], len(images))


def unlabelled(function: str, argument: str, batches: Any, *models: nn.Module) -> Iterator[Tensor]:
    """The images of every batch, whatever else it carries.

    Args:
        function: the caller's name, for the error sentence.
        argument: as above, that of ``batches``.
        batches: yields images ``(B, C, H, W)`` floating, or sequences that begin with them; or one
            tensor of images.
        models: that will see the images.

    Raises:
        InvalidInput: something else, or a model that states the size of its images takes others.
    """
    if isinstance(batches, Tensor):
        batches = [batches]
    for batch in _iterated(function, argument, batches, "batches of images"):
        pair = isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch)
        yield _images(function, batch[0] if pair else batch, *models)


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Images on the device and in the floating dtype of the model's parameters."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    return images if weight is None else images.to(weight.device, weight.dtype)


def logits_of(output: Any) -> Any:
    """What a model says of its images: what it returns, or the ``.logits`` of that.

    Of a backbone of transformers, which has none, the last hidden states of all tokens.
    """
    return getattr(output, "logits", getattr(output, "last_hidden_state", output))


def classes_of(model: nn.Module) -> Any:
    """How many classes a model says it tells apart; None where it does not say."""
    return getattr(model, "num_classes", getattr(model, "num_labels", None))


def check_single_label(function: str, model: nn.Module) -> None:
    """Refuse a model that was made for labels of another kind than one class per image.

    Args:
        function: the caller's name, for the error sentence.
        model: of any library; one of transformers says it in ``config.problem_type``.

    Raises:
        InvalidInput: as said.
    """
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind not in (None, "single_label_classification"):
        raise InvalidInput(
            f"{function}: model must tell one class per image, by whose cross-entropy it is "
            f"measured, got problem_type={kind!r}"
        )


def check_logits(function: str, logits: Tensor, labels: Tensor) -> None:
    """Refuse logits that are not one row per label, and labels they have no class for.

    Args:
        function: the caller's name, for the error sentence.
        logits: what the model returned.
        labels: ``(B,)`` int64.

    Raises:
        InvalidInput: as said.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        raise InvalidInput(
            f"{function}: model must give logits ({len(labels)}, classes), got {_shown(logits)}; "
            "a timm model without pooling needs global_pool='token' or 'avg'"
        )
    check_labels(function, labels, logits.shape[1])


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
    can = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, str) or not can:
        shown = type(batches).__name__
        raise InvalidInput(f"{function}: {argument} must be an iterable of {what}, got {shown}")
    return iter(batches)


def _images(function: str, images: Any, *models: nn.Module | None) -> Tensor:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise InvalidInput(
            f"{function}: images must be a floating tensor (B, C, H, W), got {_shown(images)}"
        )
    for model in models:
        rule = "" if model is None else misfit(model, images.shape[1:])
        if rule:
            raise InvalidInput(
                f"{function}: images must be (B, {rule}) like the model takes them, "
                f"got {tuple(images.shape)}"
            )
    return images


def _labels(function: str, labels: Any, count: int) -> Tensor:
    rule = f"{function}: labels must be {count} class numbers, one per image"
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInput(f"{rule}, got {type(labels).__name__}: {error}") from None
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    # an empty list has no kind
    if found.shape != (count,) or not (whole or not count):
        raise InvalidInput(f"{rule}, got {_shown(found)}")
    return found.long()


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__
