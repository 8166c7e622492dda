"""Kernels for GPUs in Pallas' Triton backend: one file a form and pass, and what several of them share.

A kernel is named by what it computes and its pass ("one_decay_reverse"): profiles know it by that.
"""
