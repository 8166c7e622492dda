"""Accelerator kernels: arrays in, arrays out, one file per (operation, backend)."""
