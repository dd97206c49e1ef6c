"""Only the scorer, inside torch.nn.utils.prune: whole neurons are masked, the least first.

    python examples/scorer_in_nn_prune.py

The random images stand for batches of yours, (images, labels).
More: docs/score-for-torch-nn-prune.md
"""

import timm
import torch
from torch.nn.utils import prune

import vitprune_fast as vp
from vitprune_fast.integrations.nn_prune import importance_scores

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10).eval()
batches = [(torch.randn(8, 3, 64, 64), torch.randint(10, (8,))) for _ in range(4)]
importance = importance_scores(model, vp.score(model, batches, units=("neuron",)))

prune.global_unstructured(
    list(importance),  # (module, "weight") of every fc1 and fc2
    pruning_method=prune.L1Unstructured,
    importance_scores=importance,
    amount=0.3,
)
for number, block in enumerate(model.blocks):
    silent = int((block.mlp.fc2.weight_mask.sum(0) == 0).sum())
    print(f"block {number}: {silent} of {block.mlp.fc1.out_features} neurons are silent")
for module, name in importance:
    prune.remove(module, name)  # the zeros are in the weights now
