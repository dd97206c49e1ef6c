"""Triton kernels and their launchers: no argument checks and no autograd, see vitprune_fast.ops."""

if __name__ == "kernels":
    raise ImportError(
        "import vitprune_fast.kernels, not kernels: a second copy would register every op twice"
    )
