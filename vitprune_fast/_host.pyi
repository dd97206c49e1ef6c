"""Optional pybind11 unit: what the native code was built with. Absent in a build without it."""

def build_info() -> dict[str, str]:
    """Compiler, torch and CUDA versions of the build, and the vector instructions in use."""
