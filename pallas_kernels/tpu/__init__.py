"""Kernels for TPUs in Pallas' Mosaic TPU: one file an operation, and what several of them share.

A kernel is named by what it computes ("taylor_decode"): profiles and compiled programs know it by that.
"""
