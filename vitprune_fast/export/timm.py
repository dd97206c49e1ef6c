"""A folder for create_model of timm, alone where timm can build the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .. import saved_models
from ._subject import Format, Logits, Subject, check_origin


def write(subject: Subject, path: Path) -> None:
    """Write what :func:`vitprune_fast.save` does."""
    saved_models.write(subject.model, path, subject.results)


def opened(path: Path) -> Logits:
    """By timm, which knows our names of architectures here."""
    import timm

    from ..models import entrypoints as entrypoints

    # timm 1.0.23 takes weights in a folder for a torch file unless it is told where they are
    weights = str(path / "model.safetensors")
    model = timm.create_model(f"local-dir:{path}", checkpoint_path=weights).eval()
    # alone it makes models of torch's default dtype
    dtype = next(model.parameters()).dtype
    return lambda images: model(images.to(dtype))


FORMAT = Format(write, opened, check=partial(check_origin, format="timm", wanted="timm"))
