"""transformers' DeiT classifiers: a ViT with a second token, which may have its own classifier."""

from __future__ import annotations

from .hf_vit import Names, family_of

FAMILY = family_of(
    Names(
        tokens=("distillation_token",),
        classifiers=("classifier", "cls_classifier", "distillation_classifier"),
    ),
    "transformers.models.deit.configuration_deit.DeiTConfig",
)
