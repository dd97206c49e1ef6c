"""The scorer behind the interfaces of other libraries; each module imports its own at first use.

- ``torch_pruning``: importances for Torch-Pruning, and the repair of the models it leaves.
- ``transformers``: ViT, DeiT and DINOv2 classifiers of Hugging Face.
- ``torchvision``: ``vit_b_16`` and its family.
- ``nn_prune``: importance scores for ``torch.nn.utils.prune``.
"""

from __future__ import annotations
