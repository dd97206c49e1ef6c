"""Only the scorer, inside Torch-Pruning: it finds what hangs together and cuts, we say what goes.

    pip install 'vitprune_fast[torch-pruning]'
    python examples/scorer_in_torch_pruning.py

The random images stand for batches of yours, (images, labels).
More: docs/score-with-torch-pruning.md
"""

import timm
import torch
import torch_pruning as tp

from vitprune_fast.integrations.torch_pruning import TaylorImportance, repair

torch.manual_seed(0)
model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3, num_classes=10).eval()
batches = [(torch.randn(8, 3, 64, 64), torch.randint(10, (8,))) for _ in range(4)]

pruner = tp.pruner.BasePruner(
    model,
    batches[0][0][:1],
    importance=TaylorImportance(model, batches),  # in place of tp.importance.TaylorImportance()
    pruning_ratio=0.5,
    head_pruning_ratio=0.3,
    num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
    prune_num_heads=True,
    prune_head_dims=False,
    ignored_layers=[model.head],
)
pruner.step()
repair(model, pruner)  # num_heads, softmax scale and the like, which Torch-Pruning leaves

print("heads", [block.attn.num_heads for block in model.blocks])
print("neurons", [block.mlp.fc1.out_features for block in model.blocks])
assert model(batches[0][0]).shape == (8, 10)
