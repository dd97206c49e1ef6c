"""Registers that one version of Triton takes beyond the bounds of the cases: no other may.

A line goes when its fault is mended, or when its version of Triton is no longer supported.
"""

from __future__ import annotations

# Triton's version -> (label of the case, target)
KNOWN: dict[str, dict[tuple[str, int], int]] = {
    "3.6": {
        ("attention_score dQ and scores fp32 N=257 K=80", 90): 150,
        ("attention_score dQ and scores fp32 N=257 K=80", 100): 151,
        ("attention_score dQ and scores fp32 N=257 K=80, small tiles", 80): 154,
        ("attention_score forward bf16 N=257 K=80, small tiles", 80): 236,
        ("attention_score forward, whole rows bf16 N=197 K=64", 100): 253,
        ("attention_score forward, whole rows fp16 N=197 K=64", 100): 253,
        ("gated_attention dQ and gate bf16 N=197 K=32, small tiles", 80): 125,
        ("gated_attention dQ and gate bf16 N=197 K=64", 90): 146,
        ("gated_attention dQ and gate bf16 N=577 K=64", 90): 146,
        ("gated_attention dQ and gate fp16 N=197 K=64", 90): 146,
        ("gated_attention forward, whole rows bf16 N=197 K=64", 100): 222,
        ("gated_attention forward, whole rows fp16 N=197 K=64", 100): 222,
    },
}


def known(label: str, target: int) -> int:
    """The registers of a case for the Triton that is installed; 0 where none are listed."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    return KNOWN.get(version, {}).get((label, target), 0)
