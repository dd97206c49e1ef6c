"""Scores and units of torchvision's ViTs: ``vp.score`` and ``vp.describe`` under old names.

``visible_attention`` is of use without the scorer, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..scoring import score
from ..structure import describe as units
from ..structure import families

__all__ = ["score", "units", "visible_attention"]


@contextmanager
def visible_attention(model: nn.Module) -> Iterator[None]:
    """Inside the context, hooks see what enters ``out_proj``, and q, k and v.

    Every ``nn.MultiheadAttention`` of the model computes the same by other calls; its packed
    projection is a Linear ``in_proj`` of the same weights, which puts out q, k and v side by side,
    and no part of its ``state_dict``. Everything is as before on leaving, also by an exception.

    Raises:
        UnsupportedArchitecture: the model has no layout.
    """
    with families.opened(model, units(model)):
        yield
