"""The fits at one place: what a branch reads, what it writes, what a classifier answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InvalidInput
from ...modeling_pruned import Constant
from ...planning.cost import constant_dim
from ...structure import Structure
from ...structure.axes import Axis, Write
from ...structure.index import Index
from ...structure.paths import get
from ..carry import Cut
from .images import Streams
from .least_squares import Fitted, Moments, fit
from .report import Fit
from .streamed import Streamed, projection

# where the ridge of a fit starts, as a share of the mean variance of what is read
RIDGE = {"reader": 1e-2, "writer": 1e-3, "classifier": 1e-1}
# a gain below this share of the root mean square of its branch divides nothing
SMALL_GAIN = 1e-3


@dataclass(frozen=True)
class Place:
    """A branch that still writes, and what the dense model runs from it to the next that does."""

    write: Write
    until_next: tuple[Write, ...]


class Fitter:
    """Fits the maps of a cut, in place, and brings the dense stream along.

    Args:
        dense: the dense model.
        small: the smaller one.
        cut: which tensor of it was which.
        structure: of the dense model.
        index: of the plan.
        streams: before the first branch; they go along from place to place.

    Attributes:
        places: all there are, in order.
        tensors: of the smaller model, by their old names.
        changed: names of those that were fitted.
    """

    def __init__(
        self,
        dense: Streamed,
        small: Streamed,
        cut: Cut,
        structure: Structure,
        index: Index,
        streams: Streams,
    ):
        self.tensors = cut.tensors | cut.constants
        self.changed: set[str] = set()
        self._dense, self._small, self._factors = dense, small, cut.factors
        self._structure, self._index, self._batches = structure, index, streams.batches
        self._example = streams.example
        self._lead, self.places = places_of(structure, index)

    def begin(self) -> None:
        """Bring the dense stream past branches that went before the first that is left."""
        for batch in self._batches:
            batch.dense = self._dense.through(self._lead, batch.dense)

    def pass_by(self, place: Place) -> None:
        """Bring both streams past a place as it is."""
        for batch in self._batches:
            batch.dense = self._dense.through(place.until_next, batch.dense)
            batch.small = self._small.through([place.write], batch.small)

    def fit(self, place: Place) -> list[Fit]:
        """Fit a branch, and bring both streams to where the next one reads."""
        same = all(_equal(batch.dense, batch.small) for batch in self._batches)
        if same and len(place.until_next) == 1 and self._is_whole(place.write):
            self.pass_by(place)
            return []
        constant = isinstance(self._small.module(place.write.name), Constant)
        reader = None if same or constant else self._fit_reader(place.write)
        writer = self._fit_writer(place, constant=constant)
        for batch in self._batches:
            batch.small = self._small.through([place.write], batch.small)
        return [one for one in (reader, writer) if one is not None]

    def fit_classifiers(self) -> list[Fit]:
        """Fit the maps after the last branch that put out logits."""
        stream = constant_dim(self._structure, self.places[-1].write)
        return [
            self._fit_classifier(name.removesuffix(".weight"))
            for name, (rows, *columns) in self._structure.tensors.items()
            if columns == [stream]
            and not any(isinstance(factor, Axis) for part in rows.parts for factor in part)
            and self._structure.owner(name) is None
        ]

    def _is_whole(self, write: Write) -> bool:
        """Whether nothing of a branch went."""
        own = f"{write.name}."
        return all(
            len(self._index.kept_positions(dim)) == dim.length()
            for name, layout in self._structure.tensors.items()
            if name.startswith(own)
            for dim in layout
        )

    def _fit_reader(self, write: Write) -> Fit | None:
        """Map what the branch reads to what it read: ``W <- W A`` and ``b <- b + W c``."""
        names = self._maps_of(write)
        if not names:
            return None
        biases = [f"{name.removesuffix('weight')}bias" for name in names]
        moments, held_out = Moments(), Moments()
        for batch in self._batches:
            into = held_out if batch.held_out else moments
            read = self._small.reading(write, batch.small)
            into.add(read, self._dense.reading(write, batch.dense))
        kept = self._channels(write)
        start = torch.zeros(moments.outputs, moments.inputs).to(kept.device, torch.float64)
        start[kept, torch.arange(len(kept), device=kept.device)] = 1
        tied = self._tied(*names, *biases)
        found = self._fit(
            (write.name, "reader"),
            (moments, held_out),
            (start, start.new_zeros(moments.outputs)),
            has_bias=all(name in self._structure.tensors for name in biases),
            may_change=start.new_full((moments.outputs,), not tied, dtype=torch.bool),
        )
        if found.ridge is not None:
            for name, bias in zip(names, biases, strict=True):
                weight = self._rows_of(name)
                self._put(name, weight @ found.weight)
                if bias in self._structure.tensors:
                    self._put(bias, self.tensors[bias].double() + weight @ found.bias)
        return _row(write.name, "reader", found, moments, moments.spread(), tied)

    def _fit_writer(self, place: Place, *, constant: bool) -> Fit:
        """Fit the output projection so that the stream comes out as the dense one does."""
        write = place.write
        moments, held_out, written = Moments(), Moments(), Moments()
        for batch in self._batches:
            kept, old = self._channels(write), batch.dense
            output = self._dense.output(write, old)
            stream = old + self._dense.scaled(write, output)
            batch.dense = self._dense.through(place.until_next[1:], stream)
            # behind a norm only the output itself is linear in what is read
            wrote = (output if write.tail else batch.dense - old)[..., kept]
            target = wrote if write.tail else batch.dense[..., kept] - batch.small
            read = self._small.features(write, batch.small) if not constant else target[..., :0]
            (held_out if batch.held_out else moments).add(read, target)
            if not batch.held_out:
                written.add(read[..., :0], wrote)
        weight_name, bias_name = (f"{projection(write)}.{part}" for part in ("weight", "bias"))
        has_bias = bias_name in self._structure.tensors
        names = [bias_name] * has_bias + [weight_name] * (not constant)
        tied = self._tied(*names)
        reason = tied or ("a norm stands behind a constant" if constant and write.tail else "")
        gain = torch.ones_like(moments.means()[1])
        if write.gain:
            gain = self.tensors[write.gain].double()
        # what a gain hardly lets through is of no use, and dividing by that gain does harm
        heard = (gain.abs() > SMALL_GAIN * gain.square().mean().sqrt()) & (not reason)
        old_weight, old_bias = gain.new_zeros(len(gain), 0), torch.zeros_like(gain)
        if not constant:
            old_weight = self.tensors[weight_name].double()
        if has_bias:
            old_bias = self.tensors[bias_name].double()
        found = self._fit(
            (write.name, "writer"),
            (moments, held_out),
            (gain[:, None] * old_weight, gain * old_bias),
            has_bias=has_bias,
            may_change=heard,
        )
        if found.ridge is not None:
            safe = torch.where(heard, gain, 1.0)
            new = {
                weight_name: torch.where(heard[:, None], found.weight / safe[:, None], old_weight),
                bias_name: torch.where(heard, found.bias / safe, old_bias),
            }
            for name in names:
                self._put(name, new[name])
        return _row(write.name, "writer", found, moments, written.spread(), reason)

    def _fit_classifier(self, path: str) -> Fit:
        """Fit a classifier to its own answers on the dense stream."""
        moments, held_out = Moments(), Moments()
        for batch in self._batches:
            _, dense = self._dense.finish(batch.dense, self._example, [path])
            _, small = self._small.finish(batch.small, self._example, [path])
            (held_out if batch.held_out else moments).add(small[path][0], dense[path][1])
        weight_name, bias_name = f"{path}.weight", f"{path}.bias"
        has_bias = bias_name in self._structure.tensors
        names = [weight_name] + [bias_name] * has_bias
        weight = self.tensors[weight_name].double()
        bias = self.tensors[bias_name].double() if has_bias else weight.new_zeros(len(weight))
        tied = self._tied(*names)
        found = self._fit(
            (path, "classifier"),
            (moments, held_out),
            (weight, bias),
            has_bias=has_bias,
            may_change=torch.full_like(bias, not tied, dtype=torch.bool),
        )
        if found.ridge is not None:
            for name, value in zip(names, (found.weight, found.bias), strict=False):
                self._put(name, value)
        return _row(path, "classifier", found, moments, moments.spread(), tied)

    def _put(self, name: str, value: Tensor) -> None:
        self.tensors[name].copy_(value)
        self.changed.add(name)

    def _fit(
        self,
        what: tuple[str, str],
        moments: tuple[Moments, Moments],
        start: tuple[Tensor, Tensor],
        *,
        has_bias: bool,
        may_change: Tensor,
    ) -> Fitted:
        place, part = what
        if not all(one.is_finite for one in moments):
            raise InvalidInput(
                f"prune: calibration must give finite activations, got others in {place}; look at "
                "the images and the weights"
            )
        # fewer rows than columns leave directions about which the images say nothing
        ridge = RIDGE[part] * max(1.0, moments[0].inputs / moments[0].rows)
        wide = torch.promote_types(next(self._dense.model.parameters()).dtype, torch.float32)
        return fit(
            *moments,
            *start,
            ridge,
            smallest=torch.finfo(wide).eps,
            has_bias=has_bias,
            rows=may_change,
        )

    def _channels(self, write: Write) -> Tensor:
        """The channels of the stream that are kept, on its device."""
        kept = self._index.kept_positions(constant_dim(self._structure, write))
        return torch.from_numpy(kept).to(self._batches[0].dense.device)

    def _maps_of(self, write: Write) -> list[str]:
        """The matrices with which a branch reads the stream."""
        stream = constant_dim(self._structure, write)
        return [
            name
            for name, layout in self._structure.tensors.items()
            if name.startswith(f"{write.name}.") and layout[1:] == (stream,)
        ]

    def _rows_of(self, name: str) -> Tensor:
        """The kept rows of a matrix that reads the stream, with all of its columns, in float64."""
        dim, dense = self._structure.tensors[name][0], get(self._dense.model, name)
        if self.tensors[name].shape[1] == dense.shape[1]:
            return self.tensors[name].double()
        positions = torch.from_numpy(self._index.gather(dim)).to(dense.device)
        weight = dense[positions.clamp(min=0)].double() * (positions >= 0)[:, None]
        factor = self._factors.get(name)
        return weight if factor is None else weight * factor.to(weight.device)[:, None]

    def _tied(self, *names: str) -> str:
        """Why a tensor may not be changed for one place; empty where it may."""
        for name in names:
            if name in self._structure.tensors and self._structure.is_tied(name):
                return f"{name} is tied"
        return ""


def places_of(structure: Structure, index: Index) -> tuple[tuple[Write, ...], list[Place]]:
    """What the dense model runs before the first branch that still writes, and all of those."""
    lead: tuple[Write, ...] = ()
    places: list[Place] = []
    for write in structure.stream[1:]:
        if index.fates[write.name][0] in ("live", "constant"):
            places.append(Place(write, (write,)))
        elif places:
            places[-1] = Place(places[-1].write, (*places[-1].until_next, write))
        else:
            lead += (write,)
    return lead, places


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _row(
    place: str, part: str, found: Fitted, moments: Moments, spread: float, left_out: str
) -> Fit:
    def share(error: float) -> float:
        return math.sqrt(error / spread) if spread > 0 else 0.0 if error == 0 else math.inf

    if found.ridge is None and not left_out:
        left_out = "no fit lowers the error on held-out images"
    rows, columns = moments.rows, moments.inputs
    note = f"{rows} tokens for {columns} columns, so the ridge is larger" if rows < columns else ""
    errors = share(found.before), share(found.after), share(found.held_out)
    return Fit(place, part, *errors, found.ridge, left_out, note)
