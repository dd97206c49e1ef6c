"""What a model states of itself, the way timm's models do."""

from __future__ import annotations

from typing import Any


def stated_config(model: Any) -> dict[str, Any]:
    """The ``pretrained_cfg`` of a model as a mapping: input size, mean, std ...; empty without one.

    Timm keeps it as a dict, and has an object of its own for it.
    """
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    return dict(known.to_dict() if hasattr(known, "to_dict") else known)


def caveats(model: Any) -> dict[str, str]:
    """What is to be said of a model beside its numbers; it goes with the model to disk and back.

    ``weights``: they are random. ``pixels``: where statistics come from that are a guess.
    """
    return dict(getattr(model, "caveats", {}))
