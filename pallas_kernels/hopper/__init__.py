"""Kernels for Hopper GPUs in Pallas' Mosaic GPU: one file an operation and pass, and what several of them share.

A kernel is named by what it computes and its pass ("taylor_forward"): profiles know it by that.
"""
