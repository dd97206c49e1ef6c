"""First-order Taylor scores of every sample from one batched backward.

With ``g(b, u)`` the derivative of sample b's loss by a gate on unit u at 1 (Michel et al. 2019,
arXiv:1905.10650, section 4.1; Molchanov et al. 2017, arXiv:1611.06440, section 2.2). No operation
of a ViT mixes samples, so one backward of the summed loss gives it for every sample.

Features ``f(x)`` stand for the normal distribution ``N(f, I)``, as logits stand for that of a
class. Of a target ``y = f + e``, ``e ~ N(0, I)``, drawn from it, the loss ``-log p(y) =
1/2 |y - f|^2 + c`` has ``g = -<df/dgate, e>``. So ``E[g^2] = |df/dgate|^2``: the Fisher information
of the gate, and the Gauss-Newton diagonal of ``1/2 |f - f_without|^2``, which is the KL divergence
of the two distributions. What is computed is ``+<df/dgate, e>``, the gradient of ``<f, e>``, which
is distributed alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batches import as_input, check_features, check_logits, features_of, logits_of
from ..errors import InvalidInput
from ..modules.modes import check_recordable, evaluating, uncompiled
from ..structure import Axis, Structure
from ..target_loss import TargetLoss
from .fused import exchanged
from .graphs import Replayed
from .labels import draw_labels, feature_numbers, label_numbers
from .probes import Probes
from .scores import Rows
from .sites import Assemble, Site, sites_of
from .taps import hooked

PathChoice = Literal["auto", "fused", "taps"]
# keeps gradients in float16 from underflow; a power of two, so that it divides out exactly
LOSS_SCALE = 1024.0
# kinds whose units contribute to a token each by their own activation x gradient
PER_TOKEN_KINDS = ("head", "qk_dim", "v_dim", "neuron")


class TaylorScorer:
    """Scores batches of one model; made by :func:`scorer`.

    Called with images, labels or other targets, and the place of the first sample in the stream, it
    returns the rows of every draw: axis name -> (samples, units).
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Probes,
        sites: Sequence[Site],
        assemble: dict[str, Assemble],
        loss_scale: float,
        loss: TargetLoss,
        drawn: tuple[int, int] | None,
        features: bool,
        cuda_graph: bool,
    ):
        self._model = model
        self._probes = probes
        self._sites = sites
        self._assemble = assemble
        self._loss_scale = loss_scale
        self._loss = loss
        self._drawn = drawn
        self._features = features
        # of one sample, by the shape of its image
        self._shapes: dict[torch.Size, torch.Size] = {}
        self._compute = Replayed(self._rows) if cuda_graph else self._rows

    def __call__(self, images: Tensor, targets: Tensor, first: int) -> Sequence[Rows]:
        images = as_input(self._model, images)
        shape = self._shapes.get(images.shape[1:])
        if self._drawn is not None:
            seed, draws = self._drawn
            if self._features:
                shape = shape or self._look(images[:1])
                targets = feature_numbers(seed, first, len(images), draws, shape.numel())
            else:
                targets = label_numbers(seed, first, len(images), draws)
        elif shape is not None:
            # without a look at the outputs nothing waits for a GPU
            outputs = torch.empty((len(images), *shape), device="meta")
            self._loss.check_targets("score", outputs, targets)
        return self._compute(images, targets.to(images.device))

    def close(self) -> None:
        """Let go of itself: the model and its graphs are freed with their last owner."""
        del self._compute

    def _read(self, images: Tensor) -> Any:
        output = self._model(images)
        return features_of(output) if self._features else logits_of(output)

    @uncompiled()
    @torch.no_grad()
    def _look(self, image: Tensor) -> torch.Size:
        """How large the features of one image are."""
        self._check(image, self._read(image), image)
        return self._shapes[image.shape[1:]]

    def _check(self, images: Tensor, outputs: Any, targets: Tensor) -> None:
        """Refuse outputs of another kind, once for all images of a shape."""
        if images.shape[1:] in self._shapes:
            return
        if self._features:
            check_features("score", outputs, len(images))
        elif self._drawn is not None:
            labels = torch.zeros(len(images), dtype=torch.int64)
            check_logits("score", outputs, labels, self._model)
        else:
            self._loss.check_targets("score", outputs, targets, self._model)
            self._loss.check_apart("score", outputs, targets)
        self._shapes[images.shape[1:]] = outputs.shape[1:]

    @uncompiled()
    def _rows(self, images: Tensor, targets: Tensor) -> list[Rows]:
        """Forward and backward; targets are those given, or random numbers (B, draws, ...)."""
        self._probes.clear()
        outputs = self._read(images)
        self._check(images, outputs, targets)
        if outputs.dtype in (torch.float16, torch.bfloat16):
            outputs = outputs.float()
        for site in self._sites:
            if site.key not in self._probes:
                raise InvalidInput(
                    f"score: model must call {site.module} in its forward, as its structure says, "
                    "got one that did not"
                )
        if not outputs.requires_grad:
            raise InvalidInput(
                "score: model must have a unit of the asked kinds left, got one without any"
            )
        *some, final = self._losses(outputs, targets)
        rows = [self._rows_for(loss, last=False) for loss in some]
        return [*rows, self._rows_for(final, last=True)]

    def _losses(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """One loss per draw, summed, so that scores do not depend on the batch of a sample."""
        if self._features:
            flat = outputs.flatten(1)
            return [(flat * e.to(flat.dtype)).sum() for e in targets.unbind(1)]
        every = [targets] if self._drawn is None else draw_labels(outputs, targets)
        found = [self._loss.each("score", outputs, each).sum() for each in every]
        if not all(loss.requires_grad for loss in found):
            raise InvalidInput(
                "score: loss must be differentiable by the outputs, got one without a gradient "
                f"from {self._loss.name}"
            )
        return found

    def _rows_for(self, loss: Tensor, *, last: bool) -> Rows:
        readings = self._probes.readings(loss * self._loss_scale, retain_graph=not last)
        rows = {name: assemble(readings) for name, assemble in self._assemble.items()}
        if self._loss_scale != 1:
            rows = {name: value / self._loss_scale for name, value in rows.items()}
        return rows


@contextmanager
def scorer(
    model: nn.Module,
    structure: Structure,
    axes: Sequence[Axis],
    *,
    path: PathChoice = "auto",
    per_token: bool = False,
    loss_scale: float | None = None,
    loss: TargetLoss | None = None,
    drawn: tuple[int, int] | None = None,
    features: bool = False,
    cuda_graph: bool = False,
) -> Iterator[TaylorScorer]:
    """A model made ready for scoring: frozen, in evaluation mode, with probes at its units.

    On leaving, also by an exception, the model is exactly what it was.

    Args:
        model: to score.
        structure: where its units are.
        axes: which of them to score.
        path: ``fused`` exchanges the forward of known modules, ``taps`` only hooks; ``auto`` takes
            ``fused`` wherever a module is known.
        per_token: add up magnitudes per token.
        loss_scale: the loss is multiplied and the scores divided by it.
        loss: of outputs and targets; None is cross-entropy.
        drawn: (seed, draws): targets are drawn from the model itself.
        features: the model puts out features, and targets are drawn around them.
        cuda_graph: replay the step as a CUDA graph; the model must be on a GPU.

    Raises:
        InvalidInput: gradients cannot exist here, an axis cannot be measured, or the model is in
            half precision and no loss scale is given.
    """
    check_recordable("score", model)
    if loss_scale is None and any(p.dtype == torch.float16 for p in model.parameters()):
        raise InvalidInput(
            "score: loss_scale must be given for a model in float16, whose gradients underflow, "
            f"got None; {LOSS_SCALE:g} is a good start, or convert the model to bfloat16"
        )
    if cuda_graph and not next(model.parameters()).is_cuda:
        raise InvalidInput(
            "score: cuda_graph must be False for a model that is not on a GPU, got True"
        )
    if per_token:
        for axis in axes:
            # others have no term of their own at every token
            if axis.kind not in PER_TOKEN_KINDS:
                raise InvalidInput(
                    f"score: units must be among {', '.join(PER_TOKEN_KINDS)} for the reduction "
                    f"'token_abs', got {axis.kind!r}"
                )
    sites, assemble = sites_of(structure, axes)
    probes = Probes(per_token)

    chosen, scale = loss or TargetLoss.of("score", None), loss_scale or 1.0
    ready = TaylorScorer(model, probes, sites, assemble, scale, chosen, drawn, features, cuda_graph)
    with closing(ready), scoring_mode(model), torch.enable_grad():
        if path == "taps":
            with hooked(model, sites, probes):
                yield ready
            return
        with exchanged(model, sites, probes) as rest:
            known = [site for site in rest if not site.of_bias]
            if path == "fused" and known:
                raise InvalidInput(
                    "score: path must be 'auto' or 'taps' for a model with modules that have no "
                    f"fused form, got 'fused' and {known[0].module}"
                )
            with hooked(model, rest, probes):
                yield ready


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Weights frozen, dropout and drop path off; everything as before afterwards, also on errors.

    Frozen weights mean that no weight gradient exists at any time: forward and input gradients are
    all that is computed.
    """
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with evaluating(model):
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter, flag in requires_grad.items():
                parameter.requires_grad_(flag)
