"""Scores: one number per unit of each axis, larger always means keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DamagedFile, InvalidInput
from ..files import parse_json, read_metadata, read_tensors, write_tensors
from ..structure import Structure

FORMAT = "vitprune_fast.scores"


@dataclass(frozen=True, repr=False)
class Scores(Mapping[str, Tensor]):
    """A mapping from axis name to a 1-D fp32 tensor, in the axis' order.

    Args:
        by_axis: axis name -> (units,) fp32. Larger means keep, except that ``signed`` values are
            ranked by magnitude (see :meth:`ranking`).
        criterion: ``"taylor"``, ``"fisher"``, ``"kl"``, ``"loss"``, ``"activation"`` or
            ``"magnitude"``.
        reduction: how samples were put together: ``abs`` = mean |g|, ``square`` = mean g^2,
            ``signed`` = mean g, ``token_abs`` = mean over samples and tokens of |g of a token|,
            ``mean`` = the mean as it is; for magnitude the norm, ``l1``, ``l2`` or ``group``.
        samples: how many samples were counted.
        skipped: samples set aside because a score of theirs was not finite.
        per_sample: axis name -> (samples, units) fp32, the g themselves, where they were asked for.
        provenance: facts about where the scores come from: family of the model, version of torch,
            seed and draws of the labels for ``fisher``; where a dtype was asked for, its name, and
            in 16 bits how it ranks units compared with float32 (see ``score``).
    """

    by_axis: Mapping[str, Tensor]
    criterion: str
    reduction: str
    samples: int
    skipped: int = 0
    per_sample: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, axis: str) -> Tensor:
        return self.by_axis[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_axis)

    def __len__(self) -> int:
        return len(self.by_axis)

    def __repr__(self) -> str:
        return (
            f"Scores({self.criterion}, {self.reduction}, {self.samples} samples, "
            f"{len(self)} axes, {sum(len(v) for v in self.by_axis.values())} units)"
        )

    def ranking(self, axis: str) -> Tensor:
        """(units,) fp64, larger means keep: the values, or their magnitude where signed."""
        values = self.by_axis[axis].double()
        return values.abs() if self.reduction == "signed" else values

    def check_of(self, caller: str, structure: Structure) -> None:
        """Refuse these scores for a model that has other units.

        Args:
            caller: for the error sentence.
            structure: of the model.

        Raises:
            InvalidInput: an axis is missing in the model, or of another size there.
        """
        for name, values in self.items():
            axis = structure.axes.get(name)
            if axis is None or len(values) != axis.size:
                raise InvalidInput(
                    f"{caller}: scores must belong to this model, got {len(values)} scores for "
                    f"{name!r}, which has {axis.size if axis else 'no'} units"
                )

    def save(self, path: str | Path) -> None:
        """Write values and per-sample scores as one safetensors file, atomically."""
        tensors = {f"values/{name}": value for name, value in self.by_axis.items()}
        tensors |= {f"per_sample/{name}": value for name, value in self.per_sample.items()}
        metadata = {
            "format": FORMAT,
            "criterion": self.criterion,
            "reduction": self.reduction,
            "samples": str(self.samples),
            "skipped": str(self.skipped),
            # safetensors keeps no order, and an axis' place in the model matters to a reader
            "axes": json.dumps(list(self.by_axis)),
            "provenance": json.dumps(dict(self.provenance)),
        }
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read scores written by :meth:`save`.

        Raises:
            DamagedFile: the file is not a scores file.
        """
        tensors, metadata = read_tensors(path), read_metadata(path)
        try:
            return cls._from_file(tensors, metadata)
        except (KeyError, ValueError, TypeError) as error:
            raise DamagedFile(
                f"Scores.load: {path} must hold scores, got a file without {error!s:.500}"
            ) from None

    @classmethod
    def _from_file(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Scores:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {FORMAT}")
        axes = parse_json(metadata["axes"].encode())
        provenance = parse_json(metadata["provenance"].encode())
        if not isinstance(axes, list) or not isinstance(provenance, dict):
            raise ValueError("a list of axes and named facts about where they come from")
        values = {name: tensors[f"values/{name}"] for name in axes}
        per_sample = {
            name: tensors[f"per_sample/{name}"] for name in axes if f"per_sample/{name}" in tensors
        }
        samples, skipped = int(metadata["samples"]), int(metadata["skipped"])
        if min(samples, skipped) < 0:
            raise ValueError("numbers of samples")
        for name, value in values.items():
            rows = per_sample.get(name, value)
            if value.ndim != 1 or not (value.is_floating_point() and rows.is_floating_point()):
                raise ValueError(f"one floating number per unit of {name}")
            if name in per_sample and rows.shape != (samples, len(value)):
                raise ValueError(f"one number per sample and unit of {name}")
        return cls(
            values,
            metadata["criterion"],
            metadata["reduction"],
            samples,
            skipped,
            per_sample,
            provenance,
        )


Rows = Mapping[str, Tensor]
"""Axis name -> (samples, units): the per-sample scores of one batch."""

MeasureBatch = Callable[[Tensor, Tensor | None], Rows]
"""From the images and labels of a batch to its rows, by forwards alone."""


@dataclass
class Partial:
    """What one micro-batch adds to the sums.

    Args:
        sums: (units of all axes,) fp64.
        counts: samples counted and samples set aside, (2,) int64.
        rows: (samples, units of all axes) fp32 and fp64 in fp64 models, where they are kept.
    """

    sums: Tensor
    counts: Tensor
    rows: Tensor | None = None


class Accumulator:
    """Sums of per-sample scores over a stream of micro-batches, in fp64 and in stream order.

    Nothing here waits for the device: samples with a score that is not finite count as zero in the
    sums and are told apart by the counts.

    Args:
        axes: names and sizes of the axes, in the order of the rows.
        reduction: of the samples.
        keep_samples: keep the rows themselves.
        combine: makes scores of the means of an axis, (size,) fp64; None takes the means.
    """

    def __init__(
        self,
        axes: Mapping[str, int],
        reduction: str,
        keep_samples: bool = False,
        combine: Callable[[Tensor], Tensor] | None = None,
    ):
        self.axes = dict(axes)
        self.reduction = reduction
        self._combine = combine
        self.sums: Tensor | None = None
        self.counts = torch.zeros(2, dtype=torch.int64)
        self.rows: list[Tensor] | None = [] if keep_samples else None

    def partial(self, draws: Sequence[Rows]) -> Partial:
        """Reduce the rows of one micro-batch; several draws of its labels count as their mean."""
        wide = [torch.cat([rows[name] for name in self.axes], dim=1) for rows in draws]
        finite = torch.stack([rows.isfinite().all(dim=1) for rows in wide]).all(dim=0)
        counts = torch.stack([finite.sum(), (~finite).sum()])
        terms = [self._terms(rows.double()) for rows in wide]
        mean = terms[0] if len(terms) == 1 else torch.stack(terms).mean(0)
        sums = mean.where(finite[:, None], 0.0).sum(0)
        kept = None
        if self.rows is not None:
            # a row of NaN marks a sample that was set aside
            kept = wide[0].where(finite[:, None], torch.nan)
        return Partial(sums, counts, kept)

    def _terms(self, rows: Tensor) -> Tensor:
        if self.reduction == "square":
            return rows.square()
        return rows.abs() if self.reduction in ("abs", "token_abs") else rows

    def add(self, partial: Partial) -> None:
        """Add one micro-batch; call in stream order."""
        if self.sums is None:
            self.sums = torch.zeros_like(partial.sums)
        self.sums = self.sums.to(partial.sums.device) + partial.sums
        self.counts = self.counts.to(partial.counts.device) + partial.counts
        if self.rows is not None and partial.rows is not None:
            self.rows.append(partial.rows.float().cpu())

    def restore(self, sums: Tensor, counts: Tensor, rows: Tensor | None) -> None:
        """Go on from the sums of an earlier accumulator with the same axes and reduction."""
        self.sums, self.counts = sums, counts
        if self.rows is not None:
            self.rows = [] if rows is None else [rows]

    def result(self, criterion: str, provenance: Mapping[str, Any]) -> Scores:
        """The mean over the samples counted.

        Raises:
            InvalidInput: no sample was counted.
        """
        samples, skipped = (int(count) for count in self.counts)
        if not samples or self.sums is None:
            raise InvalidInput(
                "score: batches must hold at least one sample with finite scores, "
                f"got none ({skipped} set aside)"
            )
        means = self._split(self.sums / samples)
        if self._combine is not None:
            means = {name: self._combine(mean) for name, mean in means.items()}
        per_sample = {}
        if self.rows is not None:
            rows = torch.cat(self.rows)
            per_sample = self._split(rows[~rows.isnan().all(dim=1)])
        return Scores(
            {name: mean.float().cpu() for name, mean in means.items()},
            criterion,
            self.reduction,
            samples,
            skipped,
            per_sample,
            {name: str(value) for name, value in provenance.items()},
        )

    def _split(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split(list(self.axes.values()), dim=-1)
        return {name: part.contiguous() for name, part in zip(self.axes, parts, strict=True)}
