"""Accelerator kernels, one folder per op; this package imports jax and numpy alone."""
