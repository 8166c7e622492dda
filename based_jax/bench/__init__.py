"""Checks and times of single operations and of whole steps on the accelerator at hand, beside floors and peers."""
