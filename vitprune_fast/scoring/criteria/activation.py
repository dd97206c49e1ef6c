"""How much a unit puts out, from forwards alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...batches import as_input
from ...errors import InvalidInput
from ...modules.modes import evaluating
from ...modules.swap import Altered
from ...structure import Axis, Structure
from ...structure.paths import get
from ...structure.places import Place
from ...structure.table import Write
from ..criterion import Criterion, by_forwards
from ..scores import MeasureBatch, Rows

# takes (samples, units) of one place or branch
Record = Callable[[Tensor], None]


def activation(model: nn.Module, structure: Structure, axes: Sequence[Axis]) -> MeasureBatch:
    """The mean size of what each unit puts out, for every sample; >= 0, larger means keep.

    With n the tokens of a sample:

    ============  ==============================================================================
    neuron        mean_n |a|, a what fc2 reads: behind the activation function, gate and norm
    head          mean_n ||O||_2 over the head's dims, O what proj reads (behind the inner norm)
    v_dim         mean_n |O|
    qk_dim        mean_n sqrt(q^2 + k^2), as the product takes them: behind a q/k norm, and summed
                  over the heads where such a norm makes them share the dim; of fewer keys than
                  queries sqrt((mean_n |q|)^2 + (mean_n |k|)^2)
    embed         mean over readers of mean_n |x|, x what a reader sees of the channel: LN(x) in
                  pre-norm blocks, the stream itself in post-norm ones, the pooled token(s) at the
                  classifier; a convolution between two stages is none of them
    attn_branch,  1 - mean_n cos(x_in, x_out), x the residual stream before and after
    mlp_branch,
    block
    ============  ==============================================================================

    The head is that of Muralidharan et al. (Minitron, 2024, arXiv:2407.14679, section 2.2), with
    means over tokens and samples. Neuron and embed follow it with two changes: it takes neurons
    before the activation function, and every LayerNorm by itself. The block is Block Influence of
    Men et al. (ShortGPT, 2024, arXiv:2403.03853, equation 1); for branches the same is taken over
    one branch. q/k dims and v dims are ours.

    Dropout and drop path are off; the model comes back exactly as it was after every batch, also
    after an error.

    Args:
        model: a supported model.
        structure: of the model.
        axes: of the structure, of any unit kind.

    Returns:
        A function from images (B, C, H, W) floating, and labels that are not read, to axis name ->
        (B, units) fp32 (fp64 in fp64 models), with sums in that precision. Row b depends on sample
        b alone.
    """
    placed = [(axis, _read_places(model, structure, axis)) for axis in axes]
    writes = {write.name: write for write in structure.writes()}

    def measure_batch(images: Tensor, labels: Tensor | None) -> Rows:
        with evaluating(model), torch.no_grad(), Altered() as altered:
            readings = {axis.name: [] for axis in axes}
            for axis, places in placed:
                record = readings[axis.name].append
                if not (held := structure.held(axis)):
                    _measure_units(model, axis, places, record, altered)
                elif axis.kind == "block":
                    for path in structure.blocks:
                        _measure_block(get(model, path), record, altered)
                else:
                    for (name,) in held:
                        _measure_branch(model, writes[name], record, altered)
            model(as_input(model, images))
        for axis in axes:
            if not readings[axis.name]:
                raise InvalidInput(
                    "score: model must call the modules that its structure names, got one that "
                    f"called none of those of {axis.name!r}"
                )
        return {
            # branches are units side by side, readers of one unit are averaged
            axis.name: torch.cat(found, 1) if structure.held(axis) else torch.stack(found).mean(0)
            for axis, found in ((axis, readings[axis.name]) for axis in axes)
        }

    return measure_batch


def _read_places(model: nn.Module, structure: Structure, axis: Axis) -> list[Place]:
    """Where units are measured: once in every branch that reads them, or where they are made."""
    if structure.held(axis):
        return []
    places = structure.places(axis)
    read = {}
    for place in places:
        if place.at == "input":
            # a gate and a value layer side by side read the same
            read.setdefault(structure.owner(place.module) or place.module, place)
    norms = structure.readers.get(axis.name, places)
    made = [place for place in norms if place.at == "norm"] or list(places)
    return list(read.values()) or made


def _measure_units(
    model: nn.Module, axis: Axis, places: Sequence[Place], record: Record, altered: Altered
) -> None:
    """Record the size of every unit at each input; one size for all outputs that make it."""
    made: list[Tensor] = []

    def size(place: Place, x: Tensor) -> Tensor:
        """(samples, tokens, units): L2 norm over the entries of a unit, and heads that share it."""
        owners = place.owners(axis)
        entries = owners.argsort(stable=True)[int((owners < 0).sum()) :]
        if not torch.equal(entries, torch.arange(x.shape[-1])):
            x = x[..., entries.to(x.device)]
        x = torch.linalg.vector_norm(_wide(x).unflatten(-1, (axis.size, -1)), dim=-1)
        if x.ndim > 3:
            return torch.linalg.vector_norm(x.flatten(1, -3), dim=1)
        return x.reshape(len(x), -1, axis.size)

    for place in places:
        if place.at == "input":

            def before(_: nn.Module, inputs: tuple[Any, ...], place: Place = place) -> None:
                record(size(place, inputs[0]).mean(1))

            altered.before(get(model, place.module), before)
            continue

        def after(_: nn.Module, __: Any, output: Tensor, place: Place = place) -> None:
            made.append(size(place, output))
            if len(made) == len(places):
                if len({each.shape for each in made}) > 1:
                    made[:] = [each.mean(1, keepdim=True) for each in made]
                record(torch.linalg.vector_norm(torch.stack(made), dim=0).mean(1))
                made.clear()

        altered.after(get(model, place.module), after)


def _measure_branch(model: nn.Module, write: Write, record: Record, altered: Altered) -> None:
    """Record how far a branch turns the stream."""
    first, drop = get(model, write.name if write.post_norm else write.norm), get(model, write.drop)
    stream: list[Tensor] = []

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        stream.append(inputs[0])

    def after(_: nn.Module, __: Any, output: Tensor) -> None:
        # a block may have one drop path for both of its branches
        if stream:
            x = stream.pop()
            record(_turn(x, x + output))

    altered.before(first, before)
    altered.after(drop, after)


def _measure_block(block: nn.Module, record: Record, altered: Altered) -> None:
    def after(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        record(_turn(inputs[0], output))

    altered.after(block, after)


def _turn(before: Tensor, after: Tensor) -> Tensor:
    """1 - mean cosine over the tokens, (samples, 1)."""
    cosine = F.cosine_similarity(_wide(before), _wide(after), dim=-1)
    # rounding may leave the cosine of the same vectors just above 1
    return (1 - cosine.flatten(1).mean(1, keepdim=True)).clamp(min=0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


CRITERION = Criterion(
    by_forwards(lambda asked: activation(asked.model, asked.structure, asked.axes)), classes=False
)
