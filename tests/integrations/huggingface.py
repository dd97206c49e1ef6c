"""Small random classifiers of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from vitprune_fast.testing import randomise

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
MLP: dict[str, Any] = SMALL | {"intermediate_size": 40}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**MLP)),
    "vit-eager": lambda: ViTForImageClassification(ViTConfig(**MLP | EAGER)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**MLP)),
    "deit-teacher": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**MLP)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SMALL)),
    "dinov2-giant": lambda: Dinov2ForImageClassification(
        Dinov2Config(**SMALL, use_swiglu_ffn=True, drop_path_rate=0.3)
    ),
    "dinov2-registers": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)
    ),
}


def model_of(name: str = "vit", dtype: torch.dtype = torch.float64) -> Any:
    return randomise(MODELS[name]().to(dtype).eval(), 0)


def batch_of(size: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.arange(size) % 5
