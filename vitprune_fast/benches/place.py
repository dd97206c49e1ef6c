"""Where a bench runs, and at which sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vitprune_fast.benches.shapes import VIT_SMALLEST, Shape
from vitprune_fast.ops import Backend

TINY_BATCH = 2


@dataclass(frozen=True)
class Place:
    """A device, with sizes for it.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        backend: the form of our ops that is raced there.
        tiny: sizes that say nothing about speed: a run of them shows that everything works, on a
            CPU with kernels of Triton run by its interpreter.
        compiled: race against what ``torch.compile`` makes, and not against plain torch.
    """

    device: str
    backend: Backend
    tiny: bool = False
    compiled: bool = False

    @property
    def is_for_a_gpu(self) -> bool:
        """Whether kernels of a GPU are raced, by the interpreter of Triton too."""
        return self.device == "cuda" or self.backend == "triton"

    def batch(self, size: int) -> int:
        """Number of samples."""
        return TINY_BATCH if self.tiny else size

    @property
    def samples(self) -> int:
        """Number of samples, where no race asks for another: what fills a GPU, or a few."""
        return self.batch(256 if self.is_for_a_gpu else 4)

    def shape(self, shape: Shape) -> Shape:
        """Sizes of a model."""
        return VIT_SMALLEST if self.tiny else shape

    @property
    def smaller(self) -> dict[str, Any]:
        """What makes a ViT of timm as small as the tiny sizes, as its arguments."""
        sizes = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
        return sizes if self.tiny else {}

    def model(self, name: str) -> str:
        """Name of a model of timm."""
        return "test_vit" if self.tiny else name

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of activations; the interpreter of Triton gets bf16 wrong."""
        interpreted = self.device == "cpu" and self.backend == "triton"
        return torch.float32 if interpreted else dtype


CPU = Place("cpu", "cpu")


def on_gpu(tiny: bool, compiled: bool) -> Place:
    """The GPU; with ``tiny`` the CPU takes its place where there is none."""
    device = "cuda" if torch.cuda.is_available() or not tiny else "cpu"
    return Place(device, "triton", tiny, compiled)
