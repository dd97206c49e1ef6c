"""transformers' DINOv2 classifiers, with and without registers.

A ViT with LayerScale that takes images of any size; its classifier reads the class token beside the
mean of the patches.
"""

from __future__ import annotations

from .hf_vit import Names, family_of

FAMILY = family_of(
    Names(
        norms=("norm1", "norm2"),
        gains=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        drop="drop_path",
        tokens=("register_tokens",),
        # the registers come in behind the position embeddings
        covering=("position_embeddings", "register_tokens"),
        reads=2,
        resizes=True,
    ),
    "transformers.models.dinov2.configuration_dinov2.Dinov2Config",
    "transformers.models.dinov2_with_registers.configuration_dinov2_with_registers"
    ".Dinov2WithRegistersConfig",
)
