"""The races of `vitprune_fast.benches.ops.gather_all` as tests, and the memory of pruning."""

from __future__ import annotations

from bench.conftest import note_memory
from bench.peak_memory import peak_of_prune
from bench.raced import as_tests
from vitprune_fast.benches.ops.gather_all import cases

bench_gather_cpu, bench_gather_gpu = as_tests(cases)


def bench_gather_memory_of_prune(request):
    needed, made = peak_of_prune("vit_large_patch16_224")
    case = "ViT-L with the moments of AdamW, half of the heads and neurons, fp32"
    note_memory(request.config, case, "cpu", {"prune": needed, "result": made})
