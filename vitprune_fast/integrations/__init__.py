"""The scorer behind the interfaces of other libraries; each module imports its own at first use.

- ``torch_pruning``: importances for Torch-Pruning, and the repair of the models it leaves.
- ``nn_prune``: importance scores for ``torch.nn.utils.prune``.
"""

from __future__ import annotations
