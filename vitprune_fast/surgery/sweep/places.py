"""The fits at one place: what a branch reads, what it writes, what a classifier answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import InvalidInput
from ...modeling_pruned import Constant
from ...precision import dtype_of
from ...structure import Structure
from ...structure.paths import get
from ...structure.reading import Reading
from ...structure.table import Write
from ..moments import Cut
from .images import Batch, Streams
from .least_squares import Fitted, fit
from .report import Fit
from .samples import Kept, Samples
from .streamed import Streamed

# a gain below this share of the root mean square of its branch divides nothing
SMALL_GAIN = 1e-3
# a fit that makes weights larger than this many times the largest one is not applied
LARGEST_GROWTH = 100


@dataclass(frozen=True)
class Place:
    """A branch that still writes, and what the dense model runs from it to the next that does.

    Args:
        write: the branch.
        until_next: it and what follows in its stream.
        onward: what follows in other streams, from the stem of the next one on.
    """

    write: Write
    until_next: tuple[Write, ...]
    onward: tuple[Write, ...] = ()


class Fitter:
    """Fits the maps of a cut, in place, and brings the dense stream along.

    Args:
        dense: the dense model.
        small: the smaller one.
        cut: which tensor of it was which.
        structure: of the dense model.
        reading: of the plan.
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
        reading: Reading,
        streams: Streams,
    ):
        self.tensors = cut.tensors | cut.constants
        self.changed: set[str] = set()
        self._dense, self._small, self._factors = dense, small, cut.factors
        self._structure, self._reading, self._batches = structure, reading, streams.batches
        self._lead, self.places = places_of(structure, reading)
        self._agree = True
        self._streams = streams

    def begin(self) -> None:
        """Bring the dense stream past branches that went before the first that is left."""
        for batch in self._batches:
            batch.dense = self._dense.through(self._lead, batch.dense, batch.image)

    def pass_by(self, place: Place) -> None:
        """Bring both streams past a place as it is."""
        for batch in self._batches:
            batch.dense = self._dense.through(place.until_next, batch.dense, batch.image)
            batch.small = self._small.through([place.write], batch.small, batch.image)
        self._go_onward(place)

    def _go_onward(self, place: Place) -> None:
        """Bring both streams on to the stream of the next place, where that is another one."""
        stems = [write for write in place.onward if write.is_stem]
        for batch in self._batches:
            batch.dense = self._dense.through(place.onward, batch.dense, batch.image)
            batch.small = self._small.through(stems, batch.small, batch.image)

    def fit(self, place: Place) -> list[Fit]:
        """Fit a branch, and bring both streams to where the next one reads."""
        if self._streams_agree() and len(place.until_next) == 1 and self._is_whole(place.write):
            self.pass_by(place)
            return []
        constant = isinstance(self._small.module(place.write.name), Constant)
        fits = [] if constant or self._streams_agree() else self._fit_reader(place.write)
        fits.append(self._fit_writer(place, constant=constant))
        self._go_onward(place)
        return fits

    def fit_classifiers(self) -> list[Fit]:
        """Fit the maps after the last branch of which no output went.

        They are the classifiers, and in a CaiT, before them, those of its class attention.
        """
        stream = self._structure.stream[-1].dim
        return [
            self._fit_classifier(name.removesuffix(".weight"))
            for name, (rows, *columns) in self._structure.tensors.items()
            if name.endswith(".weight")
            and columns == [stream]
            and not any(rows.axes)
            and self._structure.owner(name) is None
        ]

    def _streams_agree(self) -> bool:
        """Whether nothing came before that makes a difference; once it did, it always does."""
        self._agree = self._agree and self._streams.agree()
        return self._agree

    def _is_whole(self, write: Write) -> bool:
        """Whether nothing of a branch went."""
        own = f"{write.name}."
        return all(
            len(self._reading.kept_positions(dim)) == dim.length()
            for name, layout in self._structure.tensors.items()
            if name.startswith(own)
            for dim in layout
        )

    def _fit_reader(self, write: Write) -> list[Fit]:
        """Map what the branch reads to what it read: ``W <- W A`` and ``b <- b + W c``."""
        names = self._maps_of(write)
        if not names:
            return []
        biases = [f"{name.removesuffix('weight')}bias" for name in names]
        samples = self._samples("reader", self._batches[0].small.shape[-1])
        some = samples.some

        def rows(batch: Batch) -> tuple[Tensor, Tensor]:
            read = self._small.reading(write, some(batch.small))
            return read, self._dense.reading(write, some(batch.dense))

        samples.add(self._streams, rows)
        kept = self._channels(write, samples.outputs)
        start = torch.eye(samples.outputs, dtype=torch.float64, device=self._device)[:, kept]
        tied = self._tied(*names, *biases)
        found = self._solve(
            write.name,
            samples,
            (start, start.new_zeros(samples.outputs)),
            has_bias=all(name in self._structure.tensors for name in biases),
            may_change=start.new_full((samples.outputs,), not tied, dtype=torch.bool),
        )
        if found.ridge is not None:
            for name, bias in zip(names, biases, strict=True):
                # a convolution reads at several places, each by a matrix of its own
                weight = self._rows_of(name).movedim(1, -1)
                self._put(name, (weight @ found.weight).movedim(-1, 1))
                if bias in self._structure.tensors:
                    shift = (weight @ found.bias).reshape(len(weight), -1).sum(1)
                    self._put(bias, self.tensors[bias].double() + shift)
        return [samples.row(write.name, found, tied)]

    def _fit_writer(self, place: Place, *, constant: bool) -> Fit:
        """Fit the output projection so that the stream comes out as the dense one does."""
        write = place.write
        columns = 0 if constant else self._small.module(write.projection).in_features
        samples = self._samples("writer", columns)
        some, kept_features = samples.some, Kept()

        def rows(batch: Batch) -> tuple[Tensor, Tensor]:
            kept = self._channels(write, batch.dense.shape[-1])
            output = self._dense.output(write, batch.dense, batch.image)
            stream = batch.dense + self._dense.scaled(write, output)
            batch.dense = self._dense.through(place.until_next[1:], stream, batch.image)
            # behind a norm only the output itself is linear in what is read
            target = some(output if write.post_norm else batch.dense)[:, kept]
            if not write.post_norm:
                target = target - some(batch.small)
            read = target[:, :0]
            if not constant:
                read = self._small.features(write, batch.small, batch.image)
            kept_features.append(read)
            return read if constant else some(read), target

        samples.add(self._streams, rows)
        found, reason = self._fit_projection(write, samples, constant=constant)
        for batch, features in zip(self._batches, kept_features, strict=True):
            if constant or features is None:
                batch.small = self._small.through([write], batch.small, batch.image)
            else:
                output = self._small.projected(write, features)
                batch.small = batch.small + self._small.scaled(write, output)
        return samples.row(write.name, found, reason)

    def _fit_projection(
        self, write: Write, samples: Samples, *, constant: bool
    ) -> tuple[Fitted, str]:
        weight_name, bias_name = (f"{write.projection}.{part}" for part in ("weight", "bias"))
        has_bias = bias_name in self._structure.tensors
        names = [bias_name] * has_bias + [weight_name] * (not constant)
        reason = self._tied(*names)
        if not names:
            reason = "it has no bias"
        elif constant and write.post_norm:
            reason = "a norm stands behind a constant"
        gain = torch.ones(samples.outputs, dtype=torch.float64, device=self._device)
        if write.gain:
            gain = self.tensors[write.gain].double()
        # dividing by a gain that lets hardly anything through does harm
        heard = (gain.abs() > SMALL_GAIN * gain.square().mean().sqrt()) & (not reason)
        weight, bias = gain.new_zeros(len(gain), 0), torch.zeros_like(gain)
        if not constant:
            weight = self.tensors[weight_name].double()
        if has_bias:
            bias = self.tensors[bias_name].double()
        found = self._solve(
            write.name,
            samples,
            (gain[:, None] * weight, gain * bias),
            has_bias=has_bias,
            may_change=heard,
        )
        if found.ridge is not None:
            safe = torch.where(heard, gain, 1.0)
            new = {
                weight_name: torch.where(heard[:, None], found.weight / safe[:, None], weight),
                bias_name: torch.where(heard, found.bias / safe, bias),
            }
            # of weights that are all zero nothing is known
            largest = LARGEST_GROWTH * float(weight.abs().max()) if weight.any() else math.inf
            if not constant and float(new[weight_name].abs().max()) > largest:
                # gains this small leave weights from which training could not go on
                reason = f"its weights would be more than {LARGEST_GROWTH} times as large"
                judge = samples.held_out.second(centred=has_bias)
                was = judge.error(gain[:, None] * weight, gain * bias)
                return replace(found, ridge=None, after=found.before, held_out=was), reason
            for name in names:
                self._put(name, new[name])
        return found, reason

    def _fit_classifier(self, path: str) -> Fit:
        """Fit a classifier to its own answers on the dense stream."""
        images = self._streams.count(held_out=False)
        samples = Samples("classifier", images, self._batches[0].small.shape[-1])

        def rows(batch: Batch) -> tuple[Tensor, Tensor]:
            _, dense = self._dense.finish(batch.dense, batch.image, [path])
            _, small = self._small.finish(batch.small, batch.image, [path])
            return samples.some(small[path][0]), samples.some(dense[path][1])

        samples.add(self._streams, rows)
        weight_name, bias_name = f"{path}.weight", f"{path}.bias"
        has_bias = bias_name in self._structure.tensors
        names = [weight_name] + [bias_name] * has_bias
        weight = self.tensors[weight_name].double()
        bias = self.tensors[bias_name].double() if has_bias else weight.new_zeros(len(weight))
        tied = self._tied(*names)
        found = self._solve(
            path,
            samples,
            (weight, bias),
            has_bias=has_bias,
            may_change=torch.full_like(bias, not tied, dtype=torch.bool),
        )
        if found.ridge is not None:
            for name, value in zip(names, (found.weight, found.bias), strict=False):
                self._put(name, value)
        return samples.row(path, found, tied)

    def _samples(self, part: str, columns: int) -> Samples:
        """For the tokens that the streams have at this place."""
        return Samples(part, self._streams.tokens(), columns, self._batches[0].dense.shape[1])

    def _put(self, name: str, value: Tensor) -> None:
        self.tensors[name].copy_(value)
        self.changed.add(name)

    def _solve(
        self,
        place: str,
        samples: Samples,
        start: tuple[Tensor, Tensor],
        *,
        has_bias: bool,
        may_change: Tensor,
    ) -> Fitted:
        if not samples.is_finite:
            raise InvalidInput(
                f"prune: calibration must give finite activations, got others in {place}; look at "
                "the images and the weights"
            )
        wide = torch.promote_types(dtype_of(self._dense.model), torch.float32)
        return fit(
            samples.fitted,
            samples.held_out,
            *start,
            samples.ridge,
            smallest=torch.finfo(wide).eps,
            has_bias=has_bias,
            may_change=may_change,
        )

    @property
    def _device(self) -> torch.device:
        return self._batches[0].dense.device

    def _channels(self, write: Write, width: int) -> Tensor | slice:
        """The channels of a stream of this width that are kept."""
        kept = self._reading.kept_positions(write.dim)
        # an index of all would copy them
        return torch.from_numpy(kept).to(self._device) if len(kept) < width else slice(None)

    def _maps_of(self, write: Write) -> list[str]:
        """The matrices and convolutions with which a branch reads the stream.

        None of those that pad: a shift of what they read would not reach what they add.
        """
        stream = write.dim
        return [
            name
            for name, layout in self._structure.tensors.items()
            if name.startswith(f"{write.name}.")
            and layout[1:2] == (stream,)
            and not any(getattr(self._small.module(name.rpartition(".")[0]), "padding", ()))
        ]

    def _rows_of(self, name: str) -> Tensor:
        """The kept rows of a matrix that reads the stream, with all of its columns, in float64."""
        dim, dense = self._structure.tensors[name][0], get(self._dense.model, name)
        if self.tensors[name].shape[1] == dense.shape[1]:
            return self.tensors[name].double()
        positions = torch.from_numpy(self._reading.gather(dim)).to(dense.device)
        factor = (positions >= 0).double()
        if name in self._factors:
            factor *= self._factors[name].to(factor)
        weight = dense[positions.clamp(min=0)].double()
        return weight * factor.view(-1, *(1,) * (weight.ndim - 1))

    def _tied(self, *names: str) -> str:
        """Why a tensor may not be changed for one place; empty where it may."""
        for name in names:
            if name in self._structure.tensors and self._structure.is_tied(name):
                return f"{name} is tied"
        return ""


def running(structure: Structure, reading: Reading) -> list[Write]:
    """What is left of the streams, in order: their stems, and all branches that still write."""
    return [
        write
        for write in structure.stream[1:]
        if write.is_stem or reading.fates[write.name][0] in ("live", "constant")
    ]


def places_of(structure: Structure, reading: Reading) -> tuple[tuple[Write, ...], list[Place]]:
    """What the dense model runs before the first branch that still writes, and all of those."""
    left = running(structure, reading)
    lead: tuple[Write, ...] = ()
    places: list[Place] = []
    for write in structure.stream[1:]:
        if write in left and not write.is_stem:
            places.append(Place(write, (write,)))
        elif not places:
            lead += (write,)
        elif write.is_stem or places[-1].onward:
            places[-1] = replace(places[-1], onward=(*places[-1].onward, write))
        else:
            places[-1] = replace(places[-1], until_next=(*places[-1].until_next, write))
    return lead, places
