"""Peak memory of one way to go through a batch, in a fresh process on the CPU.

``python bench/peak_memory.py score|full MODEL BATCH MICRO_BATCH`` prints bytes above what the
model, the images and the libraries need; with ``prune`` in their place, what it takes to prune half
of the heads and neurons with two moments per parameter, and the bytes of the result.

Address space is counted, of which an allocation of tensors touches every page: the resident
memory itself is less where the system takes pages of the libraries back meanwhile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def peak(how: str, model: str, batch: int, micro_batch: int | None = None) -> int:
    """Bytes that a fresh process needs for ``score`` or for a ``full`` backward with gradients."""
    return _run(how, model, batch, micro_batch)[0]


def peak_of_prune(model: str) -> tuple[int, int]:
    """Bytes that a fresh process needs to prune a model with AdamW's state, and those it makes."""
    needed, made = _run("prune", model, 1, 1)
    return needed, made


def peak_of_manifold(how: str, kind: str, batch: int) -> int:
    """Bytes that a fresh process needs for a manifold loss and its gradient.

    Args:
        how: ``"vitprune"``, or ``"materialised"`` for all similarities written out.
        kind: ``"intra"`` or ``"full"``.
        batch: number of images of 196 tokens, 192 wide, the teacher's 384 wide.
    """
    return _run(how, kind, batch, None)[0]


def peak_of(call: Callable[[], object], device: str) -> int:
    """Bytes that a call in this process needs at most above what is held before it.

    On a CPU only as far as no call before it needed as much.
    """
    if device == "cpu":
        before = _peak_so_far()
        call()
        return _peak_so_far() - before
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _run(how: str, model: str, batch: int, micro_batch: int | None) -> list[int]:
    command = [sys.executable, __file__, how, model, str(batch), str(micro_batch or batch)]
    # every tensor is given back when it is freed: else the peak is that of a fragmented heap
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [int(number) for number in done.stdout.split()]


def _peak_so_far() -> int:
    found = re.search(r"VmPeak:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def prune_half(name: str) -> tuple[int, int]:
    """Bytes above what is there before, and bytes of what pruning makes."""
    import timm
    import torch

    from vitprune_fast.planning import Plan
    from vitprune_fast.structure import describe
    from vitprune_fast.surgery import prune

    torch.set_num_threads(1)

    def job(model: torch.nn.Module) -> list:
        structure = describe(model)
        axes = [axis for kind in ("head", "neuron") for axis in structure.units(kind)]
        plan = Plan.of(structure, {axis.name: range(0, axis.size, 2) for axis in axes})
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.tensor(1.0), **moments}
        return [model, plan, optimizer]

    prune(*job(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=96)))
    given = job(timm.create_model(name))
    before = _peak_so_far()
    small, carried = prune(*given)
    states = [value for state in carried.state.values() for value in state.values()]
    made = sum(tensor.nbytes for tensor in (*small.parameters(), *states))
    return _peak_so_far() - before, made


def manifold(how: str, kind: str, batch: int) -> int:
    """Bytes above what the states and the libraries need."""
    import torch
    from torch.nn import functional as F

    from vitprune_fast.distill.losses.manifold import manifold_intra
    from vitprune_fast.distill.losses.manifold_full import manifold_full

    torch.set_num_threads(1)

    def written_out(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if kind == "full":
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        return (s @ s.mT - t @ t.mT).square().mean()

    ours = {"intra": manifold_intra, "full": manifold_full}[kind]
    loss = ours if how == "vitprune" else written_out

    def states(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        student = torch.randn(batch, 196, 192, requires_grad=True)
        return student, torch.randn(batch, 196, 384)

    loss(*states(1)).backward()
    student, teacher = states(batch)
    before = _peak_so_far()
    loss(student, teacher).backward()
    return _peak_so_far() - before


def main(how: str, name: str, batch: int, micro_batch: int) -> int:
    """Bytes above what the model, the images and the libraries need."""
    import timm
    import torch
    from torch.nn import functional as F

    from vitprune_fast.scoring import score

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch)
    # what the libraries need to start, on something small
    warm = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=96).eval()
    score(warm, [(torch.randn(1, 3, 32, 32), labels[:1])], units="all")
    F.cross_entropy(warm(torch.randn(1, 3, 32, 32)), labels[:1]).backward()
    before = _peak_so_far()
    # twice: gradients that are there already are added to, as a loop over batches does
    if how == "score":
        score(model, [(images, labels)] * 2, micro_batch=micro_batch)
    else:
        for _ in range(2):
            F.cross_entropy(model(images), labels).backward()
    return _peak_so_far() - before


if __name__ == "__main__":
    if sys.argv[1] == "prune":
        print(*prune_half(sys.argv[2]))
    elif sys.argv[1] in ("vitprune", "materialised"):
        print(manifold(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    else:
        print(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
