"""What one version of Triton is known to do worse than the bounds of the cases: nothing else may.

A line goes when its fault is mended, or when its version of Triton is no longer supported.
"""

from __future__ import annotations

# Triton's version -> (label of the case, target) -> bytes of stack of one thread
STACKS: dict[str, dict[tuple[str, int], int]] = {
    "3.6": {
        ("gated_activation backward bf16 gelu N=197", 90): 8,
        ("gated_activation backward bf16 gelu N=577", 90): 8,
        ("gated_activation backward bf16 quick_gelu N=197", 90): 8,
        ("gated_activation backward bf16 silu N=197", 90): 8,
        ("gated_attention forward, key mask bf16 N=257 K=128", 100): 16,
        ("gated_glu backward fp32 gelu_tanh N=197", 80): 8,
        ("gated_glu backward fp32 quick_gelu N=197", 80): 8,
        ("manifold_loss fp32 R=196 D=768 E=768, products in bf16", 90): 8,
        ("taylor_score fp32 N=197 K=64 per token", 90): 8,
    },
}

# the same -> registers of one thread
REGISTERS: dict[str, dict[tuple[str, int], int]] = {
    "3.6": {
        ("attention_score dQ and scores fp32 N=257 K=80", 90): 150,
        ("gated_attention dQ and gate bf16 N=197 K=64", 90): 146,
        ("gated_attention dQ and gate bf16 N=577 K=64", 90): 146,
        ("gated_attention dQ and gate fp16 N=197 K=64", 90): 146,
    },
}


def _version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def known_registers(label: str, target: int) -> int:
    """Registers that a case is known to take with the Triton that is installed."""
    return REGISTERS.get(_version(), {}).get((label, target), 0)


def known_stack(label: str, target: int) -> int:
    """Bytes of stack that a case is known to take with the Triton that is installed."""
    return STACKS.get(_version(), {}).get((label, target), 0)
