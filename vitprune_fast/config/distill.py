"""Settings of a training or distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from vitprune_fast.config.rules import (
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    PositiveShare,
    Rule,
    Share,
    ShareBelowOne,
    check,
)
from vitprune_fast.errors import InvalidInput
from vitprune_fast.precision import Precision
from vitprune_fast.registry import described, named, names

LOSSES = "distill/losses"
"""Where the losses are, for the registry."""


@dataclass(frozen=True)
class DistillConfig:
    """Settings of ``distill``; ``alpha=0`` without feature losses is plain training.

    The loss is ``(1 - alpha) * CE(labels) + alpha * sum of logit losses + sum of feature losses``,
    every loss times its weight; without a logit loss it is ``CE + sum of feature losses``.
    """

    epochs: PositiveInt = 60
    """Passes over the training images."""
    lr: Positive | None = None
    """Peak learning rate; unset: the one that suits the state in which the student comes, small for
    one that is nearly right, 1e-3 for one that has everything to learn; with `sgd`, gates or masks
    always 1e-3."""
    lr_batch: PositiveInt | None = None
    """Images per step that lr is meant for, of all micro-batches and processes together; with more
    or fewer the peak rises or falls in proportion (DeiT: 512, timm: 256); unset: lr as it is."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine; unset: a hundredth of lr, at most 1e-5."""
    warmup_epochs: NonNegative = 5.0
    """Epochs of linear warm-up, fractions allowed; at most half of those before the cooldown."""
    warmup_lr: NonNegative = 0.0
    """Learning rate before the first step of the warm-up."""
    cooldown_epochs: NonNegative = 0.0
    """Epochs at the end, of all of them, that stay at min_lr."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` has Nesterov-free momentum."""
    momentum: ShareBelowOne = 0.9
    """Of `sgd`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of `adamw`: how slowly the averages of gradients and of their squares change."""
    eps: Positive = 1e-8
    """Of `adamw`: added to the root of the average of squares."""
    weight_decay: NonNegative = 0.05
    """Of parameters with two dimensions or more."""
    layer_decay: PositiveShare = 1.0
    """Learning rate of a block as a share of that of the block above, in (0, 1]; heads and the
    final norm have the full one (BEiT)."""
    clip_norm: NonNegative = 1.0
    """Gradients are scaled down to this L2 norm; 0 leaves them."""
    accumulate: PositiveInt = 1
    """Batches whose gradients are averaged for one step."""
    ema: ShareBelowOne = 0.0
    """Decay of an average of the weights, which is then what is validated and comes back; 0 for
    none. The first steps weigh more (timm's warm-up of the decay). DeiT: 0.99996."""
    ema_every: Literal["step", "epoch"] = "step"
    """`epoch`: move the average at the end of each, with a decay of (1 + n) / (10 + n) after n of
    them, at most ema (UP-ViT, with 0.999)."""
    dtype: Precision = "auto"
    """What the student computes in, with weights as they are; auto: bfloat16 on a GPU that has it,
    float32 elsewhere. float16 scales the loss, and a step that overflows is skipped."""
    compile: bool = False
    """Run the student through torch.compile."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them."""
    drop_path: ShareBelowOne | None = None
    """Probability that the last block's branches are left out of a sample, falling to 0 at the
    first; unset: as the model has it."""
    label_loss: Literal["ce", "bce"] = "ce"
    """What labels are learnt by: `ce`, cross-entropy; `bce`, binary cross-entropy of every class by
    itself, mean over images and classes (ResNet strikes back, DeiT III)."""
    bce_threshold: ShareBelowOne | None = None
    """Of `bce`: classes with a larger share of a mixed label count whole, others not at all (DeiT
    III: 0, ResNet strikes back: 0.2); unset: shares as they are."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of a label spread over all classes, [0, 1)."""
    mixup: NonNegative = 0.0
    """Alpha of the Beta distribution of mixup; 0 for none (DeiT: 0.8)."""
    cutmix: NonNegative = 0.0
    """Alpha of the Beta distribution of CutMix; 0 for none (DeiT: 1, UP-ViT: 0.5)."""
    cutmix_larger: bool = False
    """An image keeps its larger part in CutMix, max(l, 1 - l) for l (UP-ViT)."""
    switch_prob: Share = 0.5
    """Share of mixed batches that CutMix takes where both are on (DeiT: 0.5)."""
    mix_prob: Share = 1.0
    """Share of batches that are mixed."""
    erase: Share = 0.0
    """Share of images of which a random rectangle becomes noise, before they are mixed (DeiT:
    0.25)."""
    loss: Annotated[
        tuple[str, ...],
        Doc(
            "What is learnt from the teacher. Of several, TEACHER:LOSS is learnt from that one, "
            f"LOSS from each. Losses: {described(LOSSES)}"
        ),
    ] = ("soft",)
    loss_weights: tuple[float, ...] = ()
    """Weights of the losses, in their order; unset: each its own, which is 1 if it says nothing."""
    loss_weights_end: tuple[float, ...] = ()
    """Weights at the end of the run, reached in a straight line; unset: they stay."""
    alpha: Share = 0.5
    """Weight of the logit losses against the labels, in [0, 1]. A student with a distillation token
    learns them with the head of that token, and answers by the mean of both heads (DeiT: 0.5)."""
    temperature: Positive = 2.0
    """Softens both sides of soft losses."""
    layers: tuple[tuple[int, int], ...] = ()
    """Pairs of (student block, teacher block) for `hidden`, `relation` and all that begin with
    `manifold`; unset: for these the first and last four (all where there are fewer), for the others
    every block, spread over the teacher's."""
    manifold_rows: Annotated[int, Rule("at least 2", lambda rows: rows >= 2)] = 192
    """Tokens drawn for `manifold_random`, the random part of `manifold`."""
    gate_lr: Positive | None = None
    """Peak learning rate of gates; unset: five times lr, or as much as brings them to any budget in
    the steps there are."""
    gate_threshold_lr: Positive | None = None
    """Peak learning rate of learned thresholds of gates; unset: that of the gates, or as much as
    brings them to any budget in the steps there are."""
    gate_budget_lr: Positive | None = None
    """Peak learning rate at which the multipliers of a gate budget rise; unset: 0.1, or as much as
    makes them outweigh the other losses in the steps there are."""
    seed: int = 0
    """Of dropout, drop-path, mixing and whatever else draws numbers inside a step."""
    keep: Literal["last", "best", "one-se"] = "last"
    """Which weights come back: those of the last epoch; those with the `best` top-1 on the
    validation images, be it the student's as it was given or of an epoch (the earliest of equals;
    with masks among the epochs that ended with the last ones); or by `one-se` the last of those
    whose top-1 is at most one standard error below the best, so that few images do not throw
    away what was learnt."""
    max_bad_steps: NonNegativeInt = 10
    """More steps with a non-finite loss or gradient in a row end the run."""
    checkpoint_steps: NonNegativeInt = 0
    """Write a checkpoint after so many steps as well as after every epoch; 0 for epochs only."""
    log_steps: NonNegativeInt = 10
    """An event after so many steps; 0 for epochs only."""

    def __post_init__(self) -> None:
        check("DistillConfig", self)
        largest = math.inf if self.lr is None else self.lr
        together = {
            "lr_batch": (self.lr_batch is None or self.lr is not None, "be unset without lr"),
            "min_lr": (0 <= (self.min_lr or 0) <= largest, "be between 0 and lr"),
            "warmup_lr": (self.warmup_lr <= largest, "be at most lr"),
            "cooldown_epochs": (self.cooldown_epochs < self.epochs, "be below epochs"),
            "betas": (
                len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
                "be two numbers in [0, 1)",
            ),
            "bce_threshold": (
                self.bce_threshold is None
                or (self.label_loss == "bce" and not self.label_smoothing),
                "be unset, or given with label_loss bce and without label_smoothing",
            ),
            "cutmix_larger": (self.cutmix > 0 or not self.cutmix_larger, "be off without cutmix"),
        }
        for name, (holds, rule) in together.items():
            if not holds:
                raise InvalidInput(f"DistillConfig: {name} must {rule}, got {getattr(self, name)}")
        known = names(LOSSES)
        if isinstance(self.loss, str):
            raise InvalidInput(
                f"DistillConfig: loss must be a tuple of names, got {self.loss!r}; say "
                f"({self.loss!r},)"
            )
        if unknown := [w for w in self.loss if w[:1] == ":" or _kind(w) not in known]:
            raise InvalidInput(
                f"DistillConfig: loss must hold names among {', '.join(known)}, got {unknown[0]!r}"
            )
        if len(set(self.loss)) < len(self.loss):
            raise InvalidInput(
                f"DistillConfig: loss must name each loss once, got {', '.join(self.loss)}"
            )
        for name in ("loss_weights", "loss_weights_end"):
            weights = getattr(self, name)
            fits = len(weights) in (0, len(self.loss))
            if not fits or not all(math.isfinite(w) and w >= 0 for w in weights):
                raise InvalidInput(
                    f"DistillConfig: {name} must be one finite number of at least 0 per loss "
                    f"({', '.join(self.loss)}), got {list(weights)}"
                )

    @property
    def chooses(self) -> bool:
        """Whether validation images decide which weights come back."""
        return self.keep != "last"

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, which makes shares of labels."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def learns_logits(self) -> bool:
        """Whether a logit loss takes part."""
        return self.alpha > 0 and any(self._loss(word).on_logits for word in self.loss)

    @property
    def looks_inside(self) -> bool:
        """Whether a loss compares more than logits."""
        return any(not self._loss(word).on_logits for word in self.loss)

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss looks at a teacher."""
        return self.learns_logits or self.looks_inside

    def weight(self, word: str, done: float) -> float:
        """Weight of a loss when the share ``done`` of the run is over, in [0, 1]."""
        place = self.loss.index(word)
        start = self.loss_weights[place] if self.loss_weights else self._loss(word).weight
        end = self.loss_weights_end[place] if self.loss_weights_end else start
        return start + (end - start) * min(max(done, 0.0), 1.0)

    @staticmethod
    def _loss(word: str) -> Any:
        return loss_class(_kind(word))

    def differences(self, other: Mapping[str, Any]) -> str:
        """List the settings in which a stored config differs, ``name: stored -> own``."""
        own = {each.name: _plain(getattr(self, each.name)) for each in fields(self)}
        names = [name for name in {**own, **other} if own.get(name) != _plain(other.get(name))]
        return ", ".join(f"{name}: {other.get(name)} -> {own.get(name)}" for name in names)


def loss_class(name: str) -> Any:
    """The class of a loss, see ``losses._base.Loss``; this imports torch."""
    return named(LOSSES, name, name.title().replace("_", ""))


def _kind(word: str) -> str:
    """A loss without the teacher it is learnt from."""
    return word.rpartition(":")[2]


def _plain(value: Any) -> Any:
    """As it comes out of JSON, which has no tuples."""
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
