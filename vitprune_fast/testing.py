"""Small random models of every configuration the tests and benches go through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

from .check.drawn import randomise
from .structure import families

__all__ = [
    "PVTS",
    "SMALL",
    "VITS",
    "random_cait",
    "random_images",
    "random_pvt",
    "random_vit",
    "randomise",
]

SMALL: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}
_vit = partial(VisionTransformer, **SMALL)

VITS: dict[str, Callable[..., VisionTransformer]] = {
    "plain": _vit,
    "layerscale-registers-no_embed_class": partial(
        _vit, init_values=0.1, reg_tokens=4, no_embed_class=True
    ),
    "pre_norm-avg-fc_norm-no_qkv_bias": partial(
        _vit, pre_norm=True, global_pool="avg", qkv_bias=False
    ),
    "no_class_token-no_pos_embed": partial(
        _vit, class_token=False, global_pool="avg", pos_embed="none"
    ),
    "qk_norm": partial(_vit, qk_norm=True),
    "qk_norm-rms": partial(_vit, qk_norm=True, norm_layer=RmsNorm),
    "scale_attn_norm-scale_mlp_norm": partial(_vit, scale_attn_norm=True, scale_mlp_norm=True),
    "swiglu_packed-layerscale": partial(_vit, mlp_layer=SwiGLUPacked, init_values=0.1),
    "swiglu": partial(_vit, mlp_layer=SwiGLU),
    "no_proj_bias": partial(_vit, proj_bias=False),
    "res_post_norm": partial(_vit, block_fn=ResPostBlock),
    "res_post_norm-rms": partial(_vit, block_fn=ResPostBlock, norm_layer=RmsNorm),
    "deit_distilled": partial(VisionTransformerDistilled, **SMALL),
}

_pvt = partial(
    PyramidVisionTransformerV2,
    depths=(1, 1, 1, 1),
    embed_dims=(4, 8, 20, 32),
    num_heads=(1, 2, 5, 8),
    mlp_ratios=(2, 2, 2, 2),
    num_classes=5,
)
PVTS: dict[str, Callable[..., PyramidVisionTransformerV2]] = {
    "b0": _pvt,
    "b1": partial(_pvt, embed_dims=(8, 16, 40, 64)),
    "b2": partial(_pvt, depths=(2, 1, 3, 1)),
    "b2_li": partial(_pvt, linear=True, depths=(2, 1, 1, 1)),
}
# sides that no stride and no reduction divides
PVT_IMAGE = (3, 53, 66)


def random_vit(
    config: str = "plain", *, seed: int = 0, dtype: torch.dtype = torch.float64, **args: Any
) -> Any:
    """One of ``VITS`` with random weights everywhere, norms, biases and LayerScale included.

    Args:
        config: a key of ``VITS``.
        seed: of the weights.
        dtype: of the model.
        args: constructor arguments that override those of the configuration.

    Returns:
        The model in eval mode.
    """
    model = VITS[config](**args).to(dtype).eval()
    return randomise(model, seed)


def random_pvt(
    config: str = "b0", *, seed: int = 0, dtype: torch.dtype = torch.float64, **args: Any
) -> Any:
    """One of ``PVTS`` with random weights everywhere, norms and biases included.

    Args:
        config: a key of ``PVTS``: the published model that this one is a small likeness of.
        seed: of the weights.
        dtype: of the model.
        args: constructor arguments that override those of the configuration.

    Returns:
        The model in eval mode, which states images of ``PVT_IMAGE``.
    """
    model: Any = PVTS[config](**args).to(dtype).eval()
    model.pretrained_cfg = {"input_size": PVT_IMAGE}
    return randomise(model, seed)


def random_cait(*, seed: int = 0, dtype: torch.dtype = torch.float64, **args: Any) -> Any:
    """A CaiT of the sizes of ``SMALL`` with random weights everywhere, LayerScale included.

    Args:
        seed: of the weights.
        dtype: of the model.
        args: constructor arguments that override those sizes.

    Returns:
        The model in eval mode.
    """
    return randomise(Cait(**(SMALL | args)).to(dtype).eval(), seed)


def random_images(model: Any, batch: int = 2, *, seed: int = 0) -> torch.Tensor:
    """(batch, channels, height, width) normal noise of the model's input size and dtype."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = families.of(model).images(model)
    assert channels and height and width
    images = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    return images.to(next(model.parameters()).dtype)
