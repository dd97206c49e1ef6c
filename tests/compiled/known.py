"""What one version of Triton is known to do worse than the bounds of the cases: nothing else may.

A line goes when its fault is mended, or when its version of Triton is no longer supported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """What a case is known to take: of one thread, bytes of stack and registers."""

    stack: int = 0
    registers: int = 0


# Triton's version -> (label of the case, target)
KNOWN: dict[str, dict[tuple[str, int], Known]] = {
    "3.6": {
        ("attention_score dQ and scores fp32 N=257 K=80", 90): Known(registers=150),
        ("attention_score dQ and scores fp32 N=257 K=80", 100): Known(registers=151),
        ("attention_score dQ and scores fp32 N=257 K=80, small tiles", 80): Known(registers=154),
        ("attention_score forward bf16 N=257 K=80, small tiles", 80): Known(registers=236),
        ("attention_score forward, whole rows bf16 N=197 K=64", 100): Known(registers=253),
        ("attention_score forward, whole rows fp16 N=197 K=64", 100): Known(registers=253),
        ("gated_activation backward bf16 gelu N=197", 90): Known(stack=8),
        ("gated_activation backward bf16 gelu N=577", 90): Known(stack=8),
        ("gated_activation backward bf16 quick_gelu N=197", 90): Known(stack=8),
        ("gated_activation backward bf16 silu N=197", 90): Known(stack=8),
        ("gated_attention dQ and gate bf16 N=197 K=32, small tiles", 80): Known(registers=125),
        ("gated_attention dQ and gate bf16 N=197 K=64", 90): Known(registers=146),
        ("gated_attention dQ and gate bf16 N=577 K=64", 90): Known(registers=146),
        ("gated_attention dQ and gate fp16 N=197 K=64", 90): Known(registers=146),
        ("gated_attention forward, key mask bf16 N=257 K=128", 100): Known(stack=16),
        ("gated_attention forward, whole rows bf16 N=197 K=64", 100): Known(registers=222),
        ("gated_attention forward, whole rows fp16 N=197 K=64", 100): Known(registers=222),
        ("gated_glu backward fp32 gelu_tanh N=197", 80): Known(stack=8),
        ("gated_glu backward fp32 quick_gelu N=197", 80): Known(stack=8),
        ("glu_score fp32 gelu N=197", 80): Known(registers=84),
        ("manifold_loss fp32 R=196 D=768 E=768, products in bf16", 90): Known(stack=8),
        ("taylor_score fp32 N=197 K=64 per token", 90): Known(stack=8),
    },
}


def known(label: str, target: int) -> Known:
    """The line of a case for the Triton that is installed; nothing where there is none."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    return KNOWN.get(version, {}).get((label, target), Known())
