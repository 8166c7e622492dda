"""What the commands take where nothing is said: they read it before JAX is imported."""

REPEATS = 20
"""Calls that a median is of."""
MEMORY_FRACTION = "0.92"
"""Of the GPU, where calls past 2^31 elements and large caches need more than JAX's usual three quarters."""
CHECK_PROCESSES = 8
"""Of `bench check`, on one GPU."""
SANITIZER_TOOLS = "memcheck", "racecheck", "synccheck"
"""Of compute-sanitizer."""
