"""Triton kernels compiled ahead of time for real GPUs, and what their code must look like."""
