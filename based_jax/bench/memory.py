"""Memory of a device: what a compiled program needs, and what this process has had."""

import jax


def program_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Return what a compiled step needs on a device: arguments, results that are not the donated ones, temporaries."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return sum(sizes) - memory.alias_size_in_bytes


def peak_bytes() -> int | None:
    """Return the most that was in use on a device of this process since it began; None where it is not counted."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((x["peak_bytes_in_use"] for x in found if "peak_bytes_in_use" in x), default=None)
