"""First-order Taylor scores of every sample from one batched backward.

With ``g(b, u)`` the derivative of sample b's loss by a gate on unit u at 1 (Michel et al. 2019,
arXiv:1905.10650, section 4.1; Molchanov et al. 2017, arXiv:1611.06440, section 2.2). No operation
of a ViT mixes samples, so one backward of the summed loss gives it for every sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batches import as_input, check_labels, check_logits, logits_of
from ..errors import InvalidInput
from ..modules.modes import evaluating, uncompiled
from ..structure import Axis, Structure
from .fused import exchanged
from .graphs import Replayed
from .labels import draw_labels, label_numbers
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

    Called with images, labels and the place of the first sample in the stream, it returns the rows
    of every label drawn: axis name -> (samples, units).
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Probes,
        sites: Sequence[Site],
        assemble: dict[str, Assemble],
        loss_scale: float,
        fisher: tuple[int, int] | None,
        cuda_graph: bool,
    ):
        self._model = model
        self._probes = probes
        self._sites = sites
        self._assemble = assemble
        self._loss_scale = loss_scale
        self._fisher = fisher
        self._classes: int | None = None
        self._compute = Replayed(self._rows) if cuda_graph else self._rows

    def __call__(self, images: Tensor, labels: Tensor, first: int) -> Sequence[Rows]:
        images = as_input(self._model, images)
        if self._fisher is not None:
            seed, draws = self._fisher
            numbers = label_numbers(seed, first, len(images), draws)
            return self._compute(images, numbers.to(images.device))
        if self._classes is not None:
            # known from the batch before: without a look at the logits nothing waits for a GPU
            check_labels("score", labels, self._classes)
        return self._compute(images, labels.to(images.device))

    def close(self) -> None:
        """Let go of itself: the model and its graphs are freed with their last owner."""
        del self._compute

    @uncompiled()
    def _rows(self, images: Tensor, targets: Tensor) -> list[Rows]:
        """Forward and backward; the targets are labels (B,), or random numbers (B, draws)."""
        self._probes.clear()
        logits = logits_of(self._model(images))
        if self._classes is None:
            labels = targets if self._fisher is None else targets.new_zeros(len(images)).long()
            check_logits("score", logits, labels)
            self._classes = logits.shape[1]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        for site in self._sites:
            if site.key not in self._probes:
                raise InvalidInput(
                    f"score: model must call {site.module} in its forward, as its structure says, "
                    "got one that did not"
                )
        if not logits.requires_grad:
            raise InvalidInput(
                "score: model must have a unit of the asked kinds left, got one without any"
            )
        if self._fisher is None:
            return [self._rows_for(logits, targets, last=True)]
        *some, final = draw_labels(logits, targets)
        rows = [self._rows_for(logits, labels, last=False) for labels in some]
        return [*rows, self._rows_for(logits, final, last=True)]

    def _rows_for(self, logits: Tensor, labels: Tensor, *, last: bool) -> Rows:
        # summed, so that the score of a sample does not depend on the batch it came in
        loss = F.cross_entropy(logits, labels, reduction="sum")
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
    fisher: tuple[int, int] | None = None,
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
        fisher: (seed, draws): labels are drawn from the model itself.
        cuda_graph: replay the step as a CUDA graph; the model must be on a GPU.

    Raises:
        InvalidInput: gradients cannot exist here, an axis cannot be measured, or the model is in
            half precision and no loss scale is given.
    """
    if torch.is_inference_mode_enabled():
        raise InvalidInput(
            "score: criterion must be computed outside torch.inference_mode(), which records "
            "no gradients even where they are asked for; leave it, torch.no_grad() is fine"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InvalidInput(
            "score: model must be built outside torch.inference_mode(), whose tensors take part in "
            "no gradient, got one built inside; copy its state_dict into a new one"
        )
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

    ready = TaylorScorer(model, probes, sites, assemble, loss_scale or 1.0, fisher, cuda_graph)
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
