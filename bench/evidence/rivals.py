"""Steps of what recipes are compared with, for runs of the same chain."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitprune_fast import planning
from vitprune_fast.data import Loader
from vitprune_fast.randomness import generator, seeded
from vitprune_fast.run import checks
from vitprune_fast.run.actions import scored_images
from vitprune_fast.run.inputs import remember_normalisation
from vitprune_fast.run.job import Job
from vitprune_fast.run.step import Facts
from vitprune_fast.scoring import Scores
from vitprune_fast.structure import describe


def random_scores(job: Job, *, model: str, scores: str) -> Facts:
    """Scores that say nothing."""
    structure, draw = describe(job.load(model)), generator(job.config.seed, "random scores")
    axes = [axis for kind in job.config.scoring.units for axis in structure.units(kind)]
    drawn = {axis.name: torch.rand(axis.size, generator=draw) for axis in axes}
    job.write(scores, Scores(drawn, "random", "mean", 0))
    return {"text": f"{len(drawn)} axes"}


def torch_pruned(job: Job, *, model: str, pruned: str) -> Facts:
    """Torch-Pruning's Taylor importance by its ViT script: one ratio for all widths."""
    return _torch_pruned(job, model, pruned, inside=False)


def torch_pruned_inside(job: Job, *, model: str, pruned: str) -> Facts:
    """The same inside of branches alone, its script's ``--bottleneck``: heads and neurons."""
    return _torch_pruned(job, model, pruned, inside=True)


def _torch_pruned(job: Job, model: str, pruned: str, *, inside: bool) -> Facts:
    dense: Any = job.load(model)
    wanted = job.config.plan.macs
    assert wanted is not None
    limit, images = wanted * planning.cost(dense).macs, _scoring_batches(job)
    # the largest cost within the budget, in steps of half a per cent
    low, high, best = 0, 199, None
    while high - low > 1:
        middle = (low + high) // 2
        tried = _cut(dense, images, middle / 200, inside=inside)
        if planning.cost(tried).macs <= limit:
            high, best = middle, tried
        else:
            low = middle
    assert best is not None
    remember_normalisation(best, job.data, trained=True)
    cost = planning.cost(best)
    proofs = [checks.finite(best, job.images), *checks.within_budget(cost, {"macs": int(limit)})]
    return {
        "cost": {"params": cost.params, "macs": cost.macs},
        "checks": job.keep(best, pruned, proofs),
        "text": f"{cost.macs:,} MACs at a ratio of {high / 200}",
    }


def _scoring_batches(job: Job) -> list[Any]:
    """The images that our scores read, in their order."""
    config = job.config.score
    images = scored_images(job.data, config, job.config.seed)
    return list(Loader(images, config.batch_size))


def _cut(dense: Any, batches: list[Any], ratio: float, *, inside: bool) -> nn.Module:
    import torch_pruning as tp

    from vitprune_fast.integrations.torch_pruning import repair

    model = copy.deepcopy(dense).requires_grad_(True)
    heads = model.blocks[0].attn.num_heads
    for images, labels, *_ in batches:
        F.cross_entropy(model(images), labels).backward()
    ignored = [model.head]
    if inside:
        ignored += [model.patch_embed.proj]
        ignored += [layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    pruner = tp.pruner.BasePruner(
        model,
        batches[0][0][:1],
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        # whole heads, rounded to more of them; a layer that is to lose all would keep all
        head_pruning_ratio=min(int(ratio * heads), heads - 1) / heads,
        num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=ignored,
    )
    pruner.step()
    repair(model, pruner)
    model.zero_grad()
    return model.requires_grad_(False).eval()


def from_scratch(job: Job, *, like: str, model: str) -> Facts:
    """A model of that shape with new weights."""
    fresh: Any = job.load(like)
    with seeded(job.config.seed, "from scratch"):
        for module in fresh.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()
        # wider weights than timm's own learn faster at this size
        fresh.init_weights("jax")
    return {"checks": job.keep(fresh, model), "text": f"the shape of {like}"}
