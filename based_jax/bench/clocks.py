"""What a GPU's clock and power were while it worked, as nvidia-smi tells them: a hot one is slower than it is sold."""

import contextlib
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator

import jax

SAMPLE_MILLISECONDS = 100
FIELDS = {
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "watts": "power.draw",
    "limit_watts": "power.limit",
}


@contextlib.contextmanager
def recorded(device: jax.Device) -> Iterator[dict[str, float]]:
    """Yield what has the medians of `FIELDS` over the block once it ends, and nothing where nobody tells them."""
    medians: dict[str, float] = {}
    program = shutil.which("nvidia-smi")
    if device.platform != "gpu" or program is None:
        yield medians
        return
    query = f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits"
    command = [program, *query, f"--loop-ms={SAMPLE_MILLISECONDS}", f"--id={smi_id(device.local_hardware_id or 0)}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield medians
        finally:
            process.terminate()
            medians |= medians_of(process.communicate()[0])


def smi_id(number: int) -> str:
    """Return nvidia-smi's name of a process' GPU: it counts all, a process those that CUDA_VISIBLE_DEVICES lets it."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[number] if number < len(visible) else str(number)


def medians_of(text: str) -> dict[str, float]:
    """Return the median of each field over lines of nvidia-smi; a field that a GPU does not tell is left out."""
    lines = [line.split(",") for line in text.splitlines()]
    columns = zip(*(line for line in lines if len(line) == len(FIELDS)), strict=True)
    told = {
        name: [x for x in map(_number, column) if x is not None] for name, column in zip(FIELDS, columns, strict=False)
    }
    return {name: statistics.median(values) for name, values in told.items() if values}


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
