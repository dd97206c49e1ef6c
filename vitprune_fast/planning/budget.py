"""What the pruned model may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..errors import InvalidInput
from ..structure.axes import UNIT_KINDS
from .cost import Cost

WHOLE = (int, np.integer)
NUMBER = (*WHOLE, float, np.floating)
MEASURES = ("macs", "params")


@dataclass(frozen=True)
class Budget:
    """How small the model shall be; what is given holds together.

    Args:
        macs: multiply-accumulates of one image: a share of the unpruned model's if at most 1.0 as a
            float (``0.5``), an absolute number otherwise (``2_000_000_000``).
        params: number of parameters, as above.
        keep: share of units to keep, by unit kind: ``{"head": 0.5, "neuron": 0.7}``. Kinds not
            named are kept whole, or meet ``macs`` and ``params`` where those are given as well.

    Raises:
        InvalidInput: none is given, or a value is out of range.
    """

    macs: float | int | None = None
    params: float | int | None = None
    keep: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None and self.keep is None:
            raise InvalidInput("Budget: macs, params or keep must be given, got none")
        if self.keep is not None:
            self._check_keep(self.keep)
        for name in self.measures:
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, NUMBER) or not 0 < value < math.inf:
                raise InvalidInput(
                    f"Budget: {name} must be a share in (0, 1] or a positive number, got {value!r}"
                )
            if not isinstance(value, WHOLE) and 1 < value < 1000:
                raise InvalidInput(
                    f"Budget: {name} must be a share in (0, 1] or an absolute count, "
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

    @classmethod
    def of(cls, value: Budget | float | Mapping[str, Any]) -> Budget:
        """A budget as it may be written: itself, a share of the MACs, or a mapping of its fields.

        Raises:
            InvalidInput: it is something else, or a value is out of range.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, NUMBER) and not isinstance(value, bool):
            return cls(macs=value)
        names = tuple(each.name for each in fields(cls))
        if isinstance(value, Mapping) and value.keys() <= {*names}:
            return cls(**value)
        raise InvalidInput(
            "plan: budget must be a Budget, a share of the multiply-accumulates or a mapping of "
            f"{', '.join(names)}, got {value!r}"
        )

    @property
    def measures(self) -> tuple[str, ...]:
        """Which of ``"macs"`` and ``"params"`` are limited."""
        return tuple(name for name in MEASURES if getattr(self, name) is not None)

    def limits(self, full: Cost) -> dict[str, int]:
        """Measure -> the largest count allowed, for a model that costs ``full`` unpruned."""
        found = {}
        for name in self.measures:
            value = getattr(self, name)
            is_share = not isinstance(value, WHOLE) and value <= 1
            found[name] = int(float(value) * getattr(full, name)) if is_share else int(value)
        return found
