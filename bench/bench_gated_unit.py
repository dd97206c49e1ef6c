"""The races of `vitprune_fast.benches.ops.gated_unit` as tests."""

from bench.raced import as_tests
from vitprune_fast.benches.ops.gated_unit import cases

bench_gated_unit_cpu, bench_gated_unit_gpu = as_tests(cases)
