"""What the commands take where nothing is said: they read it before JAX is imported."""

REPEATS = 20
"""Calls that a median is of."""
CHECK_PROCESSES = 8
"""Of `bench check`, on one GPU."""
SANITIZER_TOOLS = "memcheck", "racecheck", "synccheck"
"""Of compute-sanitizer."""
