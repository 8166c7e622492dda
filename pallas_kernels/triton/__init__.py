"""Kernels for GPUs in Triton, called through jax-triton (`launch.py`): one file a form and pass, and what they share.

A kernel is named by what it computes and its pass ("one_decay_reverse"): profiles know it by that.
"""
