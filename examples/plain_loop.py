"""Prune inside a plain PyTorch loop: your model, your loader, your training.

    python examples/plain_loop.py

The model and the digits stand for yours. The calls of vitprune_fast are marked with (1) to (5).
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import vitprune_fast as vp

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--out", default="pruned")
options = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.3
labels = torch.tensor(digits.target)
train = TensorDataset(images[:1200], labels[:1200])
loader = DataLoader(train, batch_size=64, shuffle=True, generator=torch.manual_seed(0))
test = DataLoader(TensorDataset(images[1200:], labels[1200:]), batch_size=256)


def fit(model: torch.nn.Module, epochs: int, lr: float) -> None:
    """Your own training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    model.train()
    for _ in range(epochs):
        for batch, target in loader:
            loss = cross_entropy(model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def accuracy(model: torch.nn.Module) -> str:
    """Top-1 on images that nothing above has seen."""
    return f"{vp.evaluate(model, test).top1:.2%}"


sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
fit(model, options.epochs, lr=1e-3)
print(f"dense        {accuracy(model)}, {vp.cost(model).macs:,} multiply-accumulates")

scores = vp.score(model, loader)  # (1) what each head and neuron is worth
plan = vp.plan(model, scores, vp.Budget(macs=0.5))  # (2) which of them stay
small = vp.prune(model, plan, calibration=loader)  # (3) a new dense model, what stays is refitted
print(f"pruned       {accuracy(small)}, {vp.cost(small).macs:,} multiply-accumulates")

fit(small, options.epochs // 3, lr=2e-4)
print(f"fine-tuned   {accuracy(small)}")
vp.save(small, options.out)  # (4) safetensors and JSON, no pickle
again = vp.load(options.out).eval()  # (5)
assert torch.equal(again(images[:8]), small(images[:8]))
print(f"saved        {options.out}")
