"""What is exported: a copy that is only read, and the images that it is judged on."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bare import bare
from ..batches import logits_of
from ..errors import BackendUnavailable, InvalidInput, UnsupportedArchitecture
from ..gates.hooks import gates_on
from ..model_card import Results
from ..modules.behaviour import check_behaviour
from ..randomness import generator
from ..stated import class_names, stated_config
from ..structure import describe, families

# two sizes that say whether a batch is free, besides the one that is traced
BATCH_SIZES, TRACED = (1, 5), 3
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: the file or folder.
        format: its name.
        gap: the largest difference between its logits and the model's.
        tolerance: what was allowed.
        batch_sizes: at which both were asked.
    """

    path: Path
    format: str
    gap: float
    tolerance: float
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A model to be exported.

    Args:
        model: a copy on the CPU, in evaluation mode, without gradients.
        shape: channels, height and width of its images.
        results: for its card.
    """

    model: Any
    shape: tuple[int, ...]
    results: Results

    @classmethod
    def of(cls, model: nn.Module, format: str, input_size: Any, results: Results) -> Subject:
        """The copy of a model that can be exported.

        Raises:
            InvalidInput: it has no weights, or does not compute by its classes alone.
            UnsupportedArchitecture: it is of no known family.
        """
        model = bare("export", model)
        if gates_on(model) is not None:
            raise InvalidInput(
                "export: model must compute by its classes alone, got gates, which a file would "
                "not hold; detach them, and cut what they close by gates.to_plan and prune"
            )
        shape = describe(model, input_size).input_size
        check_behaviour(model, "export", written=True)
        if any(tensor.is_meta for tensor in model.parameters()):
            raise InvalidInput("export: model must hold weights, got one on the meta device")
        # a copy of what was made in inference mode is made outside it, where it can be traced
        with plainly():
            plain = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        return cls(plain, shape, results)

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return next(self.model.parameters()).dtype

    @property
    def tolerance(self) -> float:
        """How far logits may be off, relative to the largest of them, or to 1."""
        return max(1e-4, 16 * torch.finfo(self.dtype).eps)

    @property
    def origin(self) -> str:
        """The package that the model's class comes from."""
        return families.qualified(type(self.model)).partition(".")[0]

    def images(self, batch: int) -> Tensor:
        """Normal noise (batch, C, H, W), always the same."""
        noise = torch.randn(batch, *self.shape, generator=generator(0, "export", batch))
        return noise.to(self.dtype)

    def gap(self, other: Logits) -> tuple[float, float]:
        """The largest difference of logits, and the largest logit or 1.

        Raises:
            InvalidInput: the model's own are not finite.
        """
        differences, sizes = [], [1.0]
        with plainly():
            for batch in BATCH_SIZES:
                images = self.images(batch)
                wanted = logits_of(self.model(images)).double()
                if not wanted.isfinite().all():
                    raise InvalidInput("export: model must put out finite logits, got NaN or inf")
                differences.append(float((other(images).double() - wanted).abs().max()))
                sizes.append(float(wanted.abs().max()))
        # max() passes over what is no number
        return float(torch.tensor(differences, dtype=torch.float64).max()), max(sizes)

    def saying(self) -> tuple[nn.Module, tuple[Tensor], Any]:
        """What exporters of torch are given: images in, logits out, for batches of any size."""
        batch = torch.export.Dim("batch", min=1)
        return _Saying(self.model).eval(), (self.images(TRACED),), ({0: batch},)

    def facts(self) -> dict[str, Any]:
        """What whoever runs the model has to know: pixel statistics, classes."""
        stated = stated_config(self.model)
        names = ("architecture", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        known = {name: stated[name] for name in names if stated.get(name) is not None}
        classes = class_names(self.model)
        return {
            "input_size": list(self.shape),
            **{n: list(v) if isinstance(v, tuple) else v for n, v in known.items()},
            **({"classes": list(classes)} if classes else {}),
        }


class _Saying(nn.Module):
    """A model of any library that takes ``images`` and puts out nothing but logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


@dataclass(frozen=True)
class Format:
    """How a format is written and read.

    Args:
        write: ``(subject, path)``: writes it there.
        opened: ``path -> (images -> logits)``, by what its users have.
        suffix: of a file that is one of this format; empty for a folder.
        check: refuses a subject before anything is written.
    """

    write: Callable[[Subject, Path], None]
    opened: Callable[[Path], Logits]
    suffix: str = ""
    check: Callable[[Subject], None] = lambda subject: None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, or a file."""
        return not self.suffix


@contextmanager
def plainly() -> Iterator[None]:
    """Without gradients, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def needed(format: str, *packages: str) -> None:
    """Ask for packages that a format takes.

    Raises:
        BackendUnavailable: one is missing.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise BackendUnavailable(
                f"export: format {format} needs {', '.join(packages)}, got {error}; "
                f"pip install 'vitprune_fast[{_EXTRAS[format]}]'"
            ) from error


_EXTRAS = {"onnx": "onnx", "hf": "transformers"}


def check_origin(subject: Subject, format: str, wanted: str) -> None:
    """Refuse a model whose class comes from another package.

    Raises:
        UnsupportedArchitecture: as said.
    """
    found = subject.origin
    if found != wanted:
        raise UnsupportedArchitecture(
            f"export: model must be of {wanted} for format {format}, got a "
            f"{type(subject.model).__name__} of {found}; use onnx, pt2 or vp.save"
        )
