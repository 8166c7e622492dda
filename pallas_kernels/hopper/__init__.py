"""Kernels for Hopper GPUs in Pallas' Mosaic GPU: one file an operation and pass, and what several of them share."""
