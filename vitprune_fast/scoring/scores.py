"""Scores: one number per unit of each axis, larger always means keep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DamagedFile, InvalidInput
from ..files import parse_json, read_metadata, read_tensors, write_tensors

FORMAT = "vitprune_fast.scores"
REDUCTIONS = ("abs", "square", "signed")


@dataclass(frozen=True, repr=False)
class Scores(Mapping[str, Tensor]):
    """A mapping from axis name to a 1-D fp32 tensor, in the axis' order.

    Args:
        by_axis: axis name -> (units,) fp32. Larger means keep, except that ``signed`` values are
            ranked by magnitude (see :meth:`ranking`).
        criterion: ``"taylor"`` or ``"magnitude"``.
        reduction: how samples were put together: ``abs`` = mean |g|, ``square`` = mean g^2,
            ``signed`` = mean g; for magnitude the norm, ``l1`` or ``l2``.
        samples: how many samples were counted.
        skipped: samples set aside because a score of theirs was not finite.
        per_sample: axis name -> (samples, units) fp32, the g themselves, where they were asked for.
        provenance: free text about where the scores come from (model, data, seed).
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
        per_sample = {
            name.removeprefix("per_sample/"): value
            for name, value in tensors.items()
            if name.startswith("per_sample/")
        }
        return cls(
            {name: tensors[f"values/{name}"] for name in axes},
            metadata["criterion"],
            metadata["reduction"],
            int(metadata["samples"]),
            int(metadata["skipped"]),
            per_sample,
            provenance,
        )


class Accumulator:
    """Sums of per-sample scores over a stream of samples, in fp64 and in stream order.

    Rows are added one by one, so the sum of given per-sample scores does not depend on how the
    stream was cut into batches.
    """

    def __init__(self, reduction: str, keep_samples: bool = False):
        if reduction not in REDUCTIONS:
            raise InvalidInput(
                f"score: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
            )
        self.reduction = reduction
        self.samples = 0
        self.skipped = 0
        self._sum: Tensor | None = None
        self._axes: dict[str, int] = {}
        self._rows: list[Tensor] | None = [] if keep_samples else None

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Add (samples, units) scores of every axis for one batch."""
        self._axes = {name: value.shape[1] for name, value in batch.items()}
        rows = torch.cat(list(batch.values()), dim=1)
        finite = rows.isfinite().all(dim=1)
        self.skipped += int((~finite).sum())
        rows = rows[finite]
        if self._rows is not None:
            self._rows.append(rows.float().cpu())
        wide = rows.double()
        terms = {"abs": wide.abs, "square": wide.square, "signed": wide.clone}[self.reduction]()
        if self._sum is None:
            self._sum = terms.new_zeros(terms.shape[1])
        for row in terms:
            self._sum += row
        self.samples += len(rows)

    def result(self, criterion: str, provenance: Mapping[str, Any]) -> Scores:
        """The mean over the samples counted."""
        if not self.samples or self._sum is None:
            raise InvalidInput(
                "score: batches must hold at least one sample with finite scores, "
                f"got none ({self.skipped} set aside)"
            )
        mean = (self._sum / self.samples).float().cpu()
        widths = list(self._axes.values())
        per_sample = {}
        if self._rows is not None:
            per_sample = dict(zip(self._axes, _split(torch.cat(self._rows), widths), strict=True))
        return Scores(
            dict(zip(self._axes, _split(mean, widths), strict=True)),
            criterion,
            self.reduction,
            self.samples,
            self.skipped,
            per_sample,
            {name: str(value) for name, value in provenance.items()},
        )


def _split(values: Tensor, widths: list[int]) -> list[Tensor]:
    return [part.contiguous() for part in values.split(widths, dim=-1)]
