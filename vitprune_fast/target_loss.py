"""What outputs are held against: classes by cross-entropy, or a loss of one's own.

A loss here gives one number per sample, of which ``score`` takes exact derivatives and ``distill``
and ``evaluate`` take means. B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune_fast.bare import stated_classes
from vitprune_fast.batches import Targets, check_labels, check_logits, classes_of
from vitprune_fast.errors import InvalidInput
from vitprune_fast.wide import wide

LossLike = Literal["bce", "mse"] | Callable[[Tensor, Tensor], Tensor]
# what transformers says of a model's labels, and the losses that suit them besides one's own
_SUITABLE = {"multi_label_classification": "bce", "regression": "mse"}


@dataclass(frozen=True)
class TargetLoss:
    """One loss of outputs and targets.

    Attributes:
        name: ``ce``, ``bce``, ``mse``, or the qualified name of a callable.
        function: (outputs (B, ...) in fp32 at least, targets (B, ...) on their device) to (B,).
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, function: str, given: LossLike | None, *, argument: str = "loss") -> TargetLoss:
        """The loss that is meant.

        Args:
            function: the caller's name, for the error sentence.
            given: None is cross-entropy with the numbers of classes.
            argument: of the caller, as above.

        Raises:
            InvalidInput: ``given`` is something else.
        """
        name: Any = "ce" if given is None else given
        if isinstance(name, str) and (given is None or name in ("bce", "mse")):
            return cls(name, _NAMED[name])
        if isinstance(given, str) or not callable(given):
            raise InvalidInput(
                f"{function}: {argument} must be None, 'bce', 'mse' or a function of (outputs, "
                f"targets), got {given!r:.80}"
            )
        return cls(_qualified(given), given)

    @property
    def targets(self) -> Targets:
        """What it reads of a batch."""
        return "labels" if self.name == "ce" else "any"

    def check(self, function: str, model: nn.Module, *, argument: str = "loss") -> None:
        """Refuse a model whose outputs this loss cannot judge, as far as the model says.

        Args:
            function: the caller's name, for the error sentence.
            model: without wrappers.
            argument: of the caller, as above.

        Raises:
            InvalidInput: it has no classifier, or fewer than two classes for cross-entropy, or was
                made for labels of another kind.
        """
        if self.is_own:
            return
        kind = getattr(getattr(model, "config", None), "problem_type", None)
        if kind in _SUITABLE and self.name != _SUITABLE[kind]:
            raise InvalidInput(
                f"{function}: {argument} must be {_SUITABLE[kind]!r} or a function of (outputs, "
                f"targets) for a model with problem_type={kind!r}, got {self.name!r}"
            )
        classes = classes_of(model)
        if isinstance(classes, int) and classes < (2 if self.name == "ce" else 1):
            raise InvalidInput(
                f"{function}: model must have a classifier {_rule(self.name)}, got "
                f"{classes or 'none'}; {_remedy(model, classes, argument)}"
            )

    @property
    def is_own(self) -> bool:
        """Whether it is a function that was given."""
        return self.name not in _NAMED

    def check_targets(
        self, function: str, outputs: Any, targets: Tensor, model: nn.Module | None = None
    ) -> None:
        """Refuse outputs and targets that do not suit each other; reads the values of labels.

        Args:
            function: the caller's name, for the error sentence.
            outputs: of the model.
            targets: ``(B, ...)``.
            model: of the outputs, which may say that they are something else.

        Raises:
            InvalidInput: as said.
        """
        if self.name == "ce":
            check_logits(function, outputs, targets, model)
            return
        if not isinstance(outputs, Tensor) or not outputs.ndim or len(outputs) != len(targets):
            shown = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise InvalidInput(
                f"{function}: model must give a tensor of {len(targets)} rows, one per target, got "
                f"{shown}"
            )
        if self._are_numbers(outputs, targets):
            check_labels(function, targets, outputs.shape[1])
        elif not self.is_own and not _alike(outputs, targets):
            raise InvalidInput(
                f"{function}: targets must have the shape {tuple(outputs.shape)} of the outputs "
                f"for {self.name!r}, got {tuple(targets.shape)}"
            )
        elif self.name == "bce" and not ((targets >= 0) & (targets <= 1)).all():
            raise InvalidInput(
                f"{function}: targets must lie in 0..1 for 'bce', got {float(targets.min()):g} to "
                f"{float(targets.max()):g}"
            )

    def check_apart(self, function: str, outputs: Tensor, targets: Tensor) -> None:
        """Refuse a function whose loss of one sample changes with what is said of another.

        Args:
            function: the caller's name, for the error sentence.
            outputs: ``(B, ...)`` floating, of the model; of one sample nothing can be seen.
            targets: on the same device.

        Raises:
            InvalidInput: as said.
        """
        if not self.is_own or len(outputs) < 2:
            return
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            first = self.each(function, leaf, targets)[0]
            if not first.requires_grad:
                return
            (moved,) = torch.autograd.grad(first, leaf)
        # outputs that are not finite give NaN instead of their zero
        if moved[1:].nan_to_num(0.0, 0.0, 0.0).any():
            raise InvalidInput(
                f"{function}: loss must be of each sample alone, got one of {self.name} that mixes "
                "the samples of a batch; leave out what is summed or normalised over them"
            )

    def each(
        self, function: str, outputs: Tensor, targets: Tensor, *, argument: str = "loss"
    ) -> Tensor:
        """The loss of every sample, (B,), in fp32 at least.

        Args:
            function: the caller's name, for the error sentence.
            outputs: ``(B, ...)`` floating.
            targets: ``(B, ...)`` on the same device, as :meth:`check_targets` takes them; floating
                ones are taken in the dtype of the outputs.
            argument: of the caller, as above.

        Raises:
            InvalidInput: what a callable gives is not one number a sample.
        """
        outputs = wide(outputs)
        if self._are_numbers(outputs, targets):
            targets = targets[:, None] == torch.arange(outputs.shape[1], device=targets.device)
        if self.name in ("bce", "mse"):
            targets = targets.to(outputs.dtype).view_as(outputs)
        elif targets.is_floating_point():
            targets = targets.to(outputs.dtype)
        found: Any = self.function(outputs, targets)
        if isinstance(found, Tensor) and found.shape == (len(outputs),):
            return found
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InvalidInput(
            f"{function}: {argument} must give one number per sample, a tensor ({len(outputs)},), "
            f"got {shown} from {self.name}; take reduction='none', and the mean over all dims but "
            "the first"
        )

    def _are_numbers(self, outputs: Tensor, targets: Tensor) -> bool:
        """Whether targets are numbers of classes that stand for one-hot rows."""
        whole = not targets.is_floating_point() and targets.dtype != torch.bool
        return self.name == "bce" and whole and targets.ndim == 1 and not _alike(outputs, targets)


def _ce(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def _bce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Every class by itself, mean over the classes."""
    each = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    return each.flatten(1).mean(1) if each.ndim > 1 else each


def _mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared difference, mean over the numbers of a sample."""
    each = F.mse_loss(outputs, targets, reduction="none")
    return each.flatten(1).mean(1) if each.ndim > 1 else each


_NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": _ce, "bce": _bce, "mse": _mse}


def _alike(outputs: Tensor, targets: Tensor) -> bool:
    """Whether they have one shape, where (B,) and (B, 1) are the same."""
    one, other = (x if x.ndim > 1 else x[:, None] for x in (outputs, targets))
    return one.shape == other.shape


def _qualified(given: Any) -> str:
    while isinstance(given, partial):
        given = given.func
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}.{named.__qualname__}"


def _rule(name: str) -> str:
    return "of at least 2 classes" if name == "ce" else "that gives what its targets are"


def _remedy(model: Any, classes: int, argument: str) -> str:
    if classes:
        return f"say {argument}='bce' or 'mse', or give a function of (outputs, targets)"
    give = "give it one"
    if hasattr(model, "reset_classifier"):
        give += " by model.reset_classifier(n)"
    elif stated_classes(model) is not None:
        give += " when it is built"
    return f"{give}, or score it by objective='features' and teach it by losses of features"
