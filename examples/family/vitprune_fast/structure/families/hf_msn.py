"""transformers' ViTMSNForImageClassification: the parts of a ViT under the names of a ViT."""

from __future__ import annotations

from .hf_vit import Names, family_of

FAMILY = family_of(Names(), "transformers.models.vit_msn.configuration_vit_msn.ViTMSNConfig")
