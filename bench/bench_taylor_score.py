"""The races of `vitprune_fast.benches.ops.taylor_score` as tests."""

from bench.raced import as_tests
from vitprune_fast.benches.ops.taylor_score import cases

bench_taylor_score_cpu, bench_taylor_score_gpu = as_tests(cases)
