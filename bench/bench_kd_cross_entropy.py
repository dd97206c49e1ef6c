"""The races of `vitprune_fast.benches.ops.kd_cross_entropy` as tests."""

from bench.raced import as_tests
from vitprune_fast.benches.ops.kd_cross_entropy import cases

bench_kd_cross_entropy_cpu, bench_kd_cross_entropy_gpu = as_tests(cases, backend="auto")
