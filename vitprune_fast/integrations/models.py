"""Which scorer goes with a model: the core's, or that of an integration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

from torch import nn

from ..scoring import Scores, score
from ..structure import Structure, describe

# home package of the model's class -> integration with units() and score()
_INTEGRATIONS = {"transformers": "transformers", "torchvision": "torchvision"}


def structure_of(model: nn.Module) -> Structure:
    """The Structure of a model of any library known here.

    Raises:
        UnsupportedArchitecture: the model has no layout.
    """
    name = _integration(model)
    return import_module(f"{__package__}.{name}").units(model) if name else describe(model)


def scorer_of(model: nn.Module, structure: Structure | None = None) -> Callable[..., Scores]:
    """What to call in place of :func:`vitprune_fast.score` for this model."""
    if structure is not None:
        return partial(score, structure=structure)
    name = _integration(model)
    return import_module(f"{__package__}.{name}").score if name else score


def _integration(model: nn.Module) -> str | None:
    return _INTEGRATIONS.get(type(model).__module__.partition(".")[0])
