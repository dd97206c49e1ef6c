"""Triton kernels and their launchers: no argument checks and no autograd, see vitprune_fast.ops."""

if __name__ == "kernels":
    # found under this name because the root of a clone is on the path: an empty package, so that no
    # op registers twice, and transformers, which asks for Hugging Face's package of the same name,
    # finds one without a version and does without it
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(f"import vitprune_fast.kernels, not kernels: it has no {name!r} here")
