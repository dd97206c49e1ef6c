"""The general path: hooks on any module with Linear layers, and one fused reduction per site.

Nothing of the model is replaced, so every architecture works whose units stand in a Structure. It
keeps the tapped activations alive until the backward; the fused path recomputes them instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidInput
from ..modules.known import runs_its_class
from ..modules.norms import epsilon, is_rms
from ..modules.swap import Altered
from ..structure.paths import get
from .probes import Probes, tap, tap_bias, tap_norm
from .sites import Site


@contextmanager
def hooked(model: nn.Module, sites: Iterable[Site], probes: Probes) -> Iterator[None]:
    """Measure the sites by hooks inside the context; the model has none of them afterwards.

    Raises:
        InvalidInput: the model has no module where a site says, or one that computes something
            else than what the site measures.
    """
    with Altered() as altered:
        for site in sites:
            module = get(model, site.module)
            if not isinstance(module, nn.Module):
                raise InvalidInput(
                    f"score: structure must name modules of the model, got {site.module!r}, which "
                    f"{type(model).__name__} does not have"
                )
            if (site.at_norm or site.of_bias) and not runs_its_class(module):
                raise InvalidInput(
                    f"score: {site.module} must run the forward of its class for units of kind "
                    f"{site.kind!r}, got one of its own; leave that kind out, or leave vp.mask and "
                    "score the pruned model"
                )
            if site.place.at == "input":
                altered.before(module, _before(site, probes))
            else:
                # before other hooks: what the module itself puts out is measured
                altered.after(module, _after(site, probes, model), first=True)
        yield


def _before(site: Site, probes: Probes) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_tapped(inputs[0], site, probes), *inputs[1:])

    return hook


def _after(site: Site, probes: Probes, model: nn.Module) -> Any:
    bias: Any = get(model, f"{site.module}.bias")

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not (site.at_norm or site.of_bias):
            return _tapped(output, site, probes)
        probe = probes.leaf(site.key, output, site.size)
        if site.of_bias:
            return tap_bias(output, probe, bias)
        return tap_norm(
            output,
            probe,
            inputs[0],
            module,
            rms=is_rms(module),
            eps=epsilon(module, output.dtype),
            output=site.place.at == "norm",
        )

    return hook


def _tapped(x: Tensor, site: Site, probes: Probes) -> Tensor:
    part = site.place.columns
    columns = x.shape[-1] if part is None else part[1] - part[0]
    if columns != site.size * site.group:
        raise InvalidInput(
            f"score: structure must give {site.module} {columns} columns like the model, "
            f"got {site.size} units of {site.group}"
        )
    probe = probes.leaf(site.key, x, site.size)
    return tap(x, probe, site.group, probes.per_token, part, site.regrouped)
