"""The scorer behind the interfaces of other libraries; each module imports its own at first use.

- ``torch_pruning``: importances for Torch-Pruning, and the repair of the models it leaves.
- ``transformers``, ``torchvision``: ``vp.score`` and ``vp.describe`` by the names they had for
  these libraries, and what makes torch's attention visible to hooks.
- ``nn_prune``: importance scores for ``torch.nn.utils.prune``.
"""

from __future__ import annotations
