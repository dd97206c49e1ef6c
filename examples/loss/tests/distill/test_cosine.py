"""The cosine loss, by its definition and in a training."""

from __future__ import annotations

import torch

import vitprune_fast as vp
from vitprune_fast.distill import DistillConfig
from vitprune_fast.testing import random_images, random_vit


def test_the_student_turns_towards_its_teacher() -> None:
    student, teacher = random_vit(dtype=torch.float32), random_vit(seed=1, dtype=torch.float32)
    data = [(random_images(student, 8, seed=n), torch.zeros(8).long()) for n in range(8)]
    config = DistillConfig(
        epochs=6, warmup_epochs=0, lr=3e-3, alpha=1.0, loss=("cosine",), loss_weights=(1.0,)
    )
    with torch.no_grad():
        ours, theirs = (
            m.eval().forward_head(m.forward_features(data[0][0]), pre_logits=True)
            for m in (student, teacher)
        )
    angle = 1 - torch.nn.functional.cosine_similarity(ours, theirs).mean()
    history = vp.distill(student, teacher, data, None, config).history
    # the average of the first epoch is below where it began, and the last far below
    assert 0 < history[-1]["cosine"] < 0.5 * float(angle)
    assert history[0]["cosine"] < 2
