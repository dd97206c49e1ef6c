"""The races of `vitprune_fast.benches.ops.attention_score` as tests."""

from bench.raced import as_tests
from vitprune_fast.benches.ops.attention_score import cases

bench_attention_score_cpu, bench_attention_score_gpu = as_tests(cases)
