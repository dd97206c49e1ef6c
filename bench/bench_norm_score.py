"""The races of `vitprune_fast.benches.ops.norm_score` as tests."""

from bench.raced import as_tests
from vitprune_fast.benches.ops.norm_score import cases

bench_norm_score_cpu, bench_norm_score_gpu = as_tests(cases)
