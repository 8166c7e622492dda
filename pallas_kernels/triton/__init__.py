"""Kernels for GPUs in Pallas' Triton backend: one file a form and pass, and what several of them share."""
