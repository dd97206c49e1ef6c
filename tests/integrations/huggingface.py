"""Small random classifiers of transformers, and where the installed version keeps their parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
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

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "vit-pooler": lambda: ViTModel(ViTConfig(**MLP)),
    "vit-backbone": lambda: ViTModel(ViTConfig(**MLP), add_pooling_layer=False),
    "deit-backbone": lambda: DeiTModel(DeiTConfig(**MLP)),
    "dinov2-backbone": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "dinov2-registers-backbone": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)
    ),
}


def model_of(name: str = "vit", dtype: torch.dtype = torch.float64) -> Any:
    return randomise((MODELS | BACKBONES)[name]().to(dtype).eval(), 0)


def batch_of(size: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.arange(size) % 5


@dataclass(frozen=True)
class Layer:
    """One layer by the names in the modeling files, not by our table."""

    block: Any
    # whose outputs are added to the stream, but for a LayerScale
    attention: Any
    mlp: Any
    norms: tuple[Any, Any]
    # query, key, value
    projections: tuple[nn.Linear, nn.Linear, nn.Linear]
    out: nn.Linear
    # all Linears of the MLP but the last
    first: list[nn.Linear]
    last: nn.Linear
    # what axes are named after: paths of block and attention, and of what holds the neurons
    path: str
    heads: str
    neurons: str

    @property
    def tells_head_dim(self) -> bool:
        """The configuration may have a head_dim; before, it is the width by the number of heads."""
        return hasattr(self.attention, "q_proj")

    @property
    def is_packed(self) -> bool:
        """Gate and value of a SwiGLU are the halves of one Linear."""
        return len(self.first) == 1 and self.first[0].out_features == 2 * self.last.in_features

    @property
    def size(self) -> tuple[int, int]:
        """Heads, and dims of each."""
        attention = self.attention
        if self.tells_head_dim:
            return attention.num_attention_heads, attention.head_dim
        return attention.attention.num_attention_heads, attention.attention.attention_head_size


def layers_of(model: Any) -> list[Layer]:
    """ViT and DeiT have had separate projections since 5.9, DINOv2 since 5.18."""
    base = model.base_model_prefix
    body = getattr(model, base)
    flat = hasattr(body, "layers")
    blocks, where = (body.layers, "layers") if flat else (body.encoder.layer, "encoder.layer")
    dino = base.startswith("dinov2")
    return [_layer(block, f"{base}.{where}.{i}", dino) for i, block in enumerate(blocks)]


def _layer(block: Any, path: str, dino: bool) -> Layer:
    attention = block.attention
    if hasattr(attention, "q_proj"):
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        out = attention.o_proj
    else:
        inner = attention.attention
        projections, out = (inner.query, inner.key, inner.value), attention.output.dense
    if not hasattr(block, "mlp"):
        mlp, first, last = block.output.dense, [block.intermediate.dense], block.output.dense
    elif hasattr(block.mlp, "fc1"):
        mlp, first, last = block.mlp, [block.mlp.fc1], block.mlp.fc2
    elif hasattr(block.mlp, "gate_proj"):
        mlp, last = block.mlp, block.mlp.down_proj
        first = [block.mlp.gate_proj, block.mlp.up_proj]
    else:
        mlp, first, last = block.mlp, [block.mlp.weights_in], block.mlp.weights_out
    norms = (block.norm1, block.norm2) if dino else (block.layernorm_before, block.layernorm_after)
    neurons = f"{path}.mlp" if hasattr(block, "mlp") else f"{path}.intermediate"
    heads = f"{path}.attention"
    return Layer(block, attention, mlp, norms, projections, out, first, last, path, heads, neurons)
