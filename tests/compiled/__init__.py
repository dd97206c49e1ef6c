"""Triton kernels compiled ahead of time for real GPUs, and what their machine code must look like."""
