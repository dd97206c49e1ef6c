"""Where each unit kind is measured, and how measurements are combined into scores of an axis.

With a gate on a unit at 1, the derivative of a sample's loss by the gate is (B samples, N tokens):

======================  =========================================================================
head, v_dim, neuron     sum_n activation x gradient at the input of the output projection
qk_dim                  sum_n q x dq; the same as sum_n k x dk
embed                   removal with statistics over the channels kept, summed over all readers of
                        the stream: sum_n y x dy plus what the norm's statistics do
attn_branch,            sum over the inner units' gates + bias . sum_n d(output of the projection);
mlp_branch              sum_n y x dy behind a post-norm, or where there are no such units
block                   sum over its branches
======================  =========================================================================

All are exact for every sample: no operation of a ViT mixes samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..structure import Axis, Structure
from ..structure.places import Place


@dataclass(frozen=True)
class Site:
    """One measurement: per-sample numbers that a backward pass leaves behind at a place.

    At an input or output: activation x gradient, summed over the tokens and the columns of a unit.
    At a norm: the removal of a channel. Of a bias: the bias of the module times the gradient of its
    output, one number per sample.

    Args:
        key: of the probe; unique.
        place: where.
        kind: unit kind it serves.
        size: numbers per sample.
        of_bias: whether it is the bias that is measured.
        regrouped: puts the columns of a number side by side, where they are not.
    """

    key: str
    place: Place
    kind: str
    size: int
    of_bias: bool = False
    regrouped: Callable[[Tensor], Tensor] | None = None

    @property
    def module(self) -> str:
        """Path of the module."""
        return self.place.module

    @property
    def at_norm(self) -> bool:
        """Whether it measures what a norm makes of its channels."""
        return self.place.at in ("norm", "statistics")

    @property
    def group(self) -> int:
        """Columns that make one number."""
        return self.place.dim.length() // self.size


# from the readings of all sites, (samples, size) each, to the scores of an axis, (samples, units)
Assemble = Callable[[Mapping[str, Tensor]], Tensor]


def sites_of(structure: Structure, axes: Sequence[Axis]) -> tuple[list[Site], dict[str, Assemble]]:
    """The measurements the axes need, each once, and how every axis is put together from them.

    Raises:
        InvalidInput: an axis cannot be measured by gradients in this family.
    """
    sites: dict[str, Site] = {}
    assemble: dict[str, Assemble] = {}

    def need(site: Site) -> str:
        sites[site.key] = site
        return site.key

    for axis in axes:
        if axis.name in structure.taps:
            assemble[axis.name] = _units(need(_tap_site(structure, axis)), axis.size)
        elif axis.name in structure.readers:
            keys = [need(site) for site in _reader_sites(structure, axis)]
            assemble[axis.name] = _sum_of(keys)
        elif held := structure.held(axis):
            groups = [
                [
                    need(site)
                    for branch in branches
                    for site in _branch_sites(structure, branch, axis.kind)
                ]
                for branches in held
            ]
            assemble[axis.name] = _totals(groups)
        else:
            raise InvalidInput(
                f"score: units must be of kinds that {structure.family} can measure by gradients, "
                f"got {axis.kind!r}"
            )
    return list(sites.values()), assemble


def _tap_site(structure: Structure, axis: Axis) -> Site:
    place = structure.taps[axis.name]
    regrouped = partial(place.side_by_side, axis) if place.is_scattered(axis) else None
    return Site(axis.name, place, axis.kind, axis.size, regrouped=regrouped)


def _reader_sites(structure: Structure, axis: Axis) -> list[Site]:
    return [
        Site(f"{axis.name}@{place.module}", place, axis.kind, axis.size)
        for place in structure.readers[axis.name]
    ]


def _branch_sites(structure: Structure, branch: str, kind: str) -> list[Site]:
    write = next(write for write in structure.writes() if write.name == branch)
    inner = [name for name, place in structure.taps.items() if place.module == write.projection]
    if write.post_norm or not inner:
        # behind a norm the projection is no longer linear in the gate: measure what is written
        written = write.norm if write.post_norm else write.projection
        return [Site(f"{branch}@write", Place(written, "output", write.dim), kind, 1)]
    sites = [_tap_site(structure, structure.axes[inner[0]])]
    if write.projected_bias in structure.tensors:
        output = Place(write.projection, "output", write.dim)
        sites.append(Site(f"{branch}@bias", output, kind, 1, of_bias=True))
    return sites


def _units(key: str, size: int) -> Assemble:
    """One site; where it measures (heads, dims) and dims are shared, the heads are summed."""

    def units(readings: Mapping[str, Tensor]) -> Tensor:
        reading = readings[key].flatten(1)
        return reading if reading.shape[1] == size else readings[key].sum(1)

    return units


def _sum_of(keys: list[str]) -> Assemble:
    return lambda readings: torch.stack([readings[key] for key in keys]).sum(0)


def _totals(groups: Sequence[Sequence[str]]) -> Assemble:
    """One unit per group: the sum of everything its sites measured."""

    def total(readings: Mapping[str, Tensor]) -> Tensor:
        sums = [torch.stack([readings[key].sum(1) for key in keys]).sum(0) for keys in groups]
        return torch.stack(sums, dim=1)

    return total
