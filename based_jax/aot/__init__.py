"""Ahead of time: what a program needs and takes on devices that are not here, read from what a compiler makes of it."""
