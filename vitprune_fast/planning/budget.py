"""What the pruned model may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InvalidInput
from ..structure.axes import UNIT_KINDS
from .cost import Cost

WHOLE = (int, np.integer)
NUMBER = (*WHOLE, float, np.floating)


@dataclass(frozen=True)
class Budget:
    """One of three ways to say how small the model shall be.

    Args:
        macs: multiply-accumulates of one image: a share of the unpruned model's if at most 1.0 as a
            float (``0.5``), an absolute number otherwise (``2_000_000_000``).
        params: number of parameters, as above.
        keep: share of units to keep, by unit kind: ``{"head": 0.5, "neuron": 0.7}``. Kinds not
            named are kept whole.

    Raises:
        InvalidInput: not exactly one is given, or a value is out of range.
    """

    macs: float | int | None = None
    params: float | int | None = None
    keep: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("macs", "params", "keep") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidInput(
                "Budget: exactly one of macs, params and keep must be given, "
                f"got {' and '.join(given) or 'none'}"
            )
        if self.keep is not None:
            self._check_keep(self.keep)
            return
        value: Any = getattr(self, given[0])
        if isinstance(value, bool) or not isinstance(value, NUMBER) or not 0 < value < math.inf:
            raise InvalidInput(
                f"Budget: {given[0]} must be a share in (0, 1] or a positive number, got {value!r}"
            )
        if not isinstance(value, WHOLE) and 1 < value < 1000:
            raise InvalidInput(
                f"Budget: {given[0]} must be a share in (0, 1] or an absolute count, "
                f"got {value!r}; 50 % is 0.5"
            )

    @staticmethod
    def _check_keep(keep: Mapping[str, Any]) -> None:
        if not isinstance(keep, Mapping) or not keep:
            raise InvalidInput(
                f"Budget: keep must map unit kinds to shares, got {keep!r}; "
                'for example {"head": 0.5, "neuron": 0.7}'
            )
        for kind, share in keep.items():
            if kind not in UNIT_KINDS:
                raise InvalidInput(
                    f"Budget: keep must name unit kinds ({', '.join(UNIT_KINDS)}), got {kind!r}"
                )
            if isinstance(share, bool) or not isinstance(share, NUMBER) or not 0 <= share <= 1:
                raise InvalidInput(
                    f"Budget: keep[{kind!r}] must be a share in [0, 1], got {share!r}"
                )

    @property
    def measure(self) -> str:
        """``"macs"``, ``"params"`` or ``"keep"``."""
        return next(n for n in ("macs", "params", "keep") if getattr(self, n) is not None)

    def limit(self, full: Cost) -> int:
        """The largest count allowed, for a model that costs ``full`` unpruned."""
        value = getattr(self, self.measure)
        if not isinstance(value, WHOLE) and value <= 1:
            return int(float(value) * getattr(full, self.measure))
        return int(value)
