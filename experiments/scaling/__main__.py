"""Time and memory of each mixer against the length of the sequence: forward and backward pass, batch 1.

python -m experiments.scaling --out=experiments/scaling/results/scaling.jsonl
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax.bench import rows
from based_jax.nn.mixers import MIXERS, make_mixer

OPTIONS = {kind: {"l_max": 1 << 20} for kind in ("hyena", "long_conv", "implicit_conv")}
CONTRAST = ("attention", "hyena", "long_conv", "implicit_conv")


def main() -> None:
    """Measure each mixer at each length; print a row as it comes, and append it to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs=2, default=(2048, 16384))
    parser.add_argument("--mixers", nargs="*", default=list(MIXERS))
    args = parser.parse_args()
    print(f"{'mixer':18} {'ms':>9} {'ms':>9} {'ratio':>6} {'MiB':>9} {'MiB':>9} {'ratio':>6}")
    for kind in args.mixers:
        measured = [measure(kind, args.d_model, length) for length in args.lengths]
        with rows.appended(args.out) as write:
            for row in measured:
                write(row | rows.facts("flax"))
        short, long = ((row["ms"], row["memory_mib"]) for row in measured)
        shown = (f"{a:9.2f} {b:9.2f} {b / a:6.1f}" for a, b in zip(short, long, strict=True))
        print(f"{kind:18} {' '.join(shown)}{'  (for contrast)' if kind in CONTRAST else ''}", flush=True)


def measure(kind: str, d_model: int, length: int) -> dict:
    """Return the median time in ms of forward and backward in bf16, and the memory of the compiled program."""
    mixer = make_mixer(kind, d_model, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **OPTIONS.get(kind, {}))
    graphdef, params = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), (1, length, d_model), jnp.bfloat16)

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x).astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    jax.block_until_ready(compiled(params, x))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, x))
        times.append(1e3 * (time.perf_counter() - start))
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {
        "mixer": kind,
        "d_model": d_model,
        "length": length,
        "ms": round(statistics.median(times), 3),
        "memory_mib": round(peak / 2**20, 2),
    }


if __name__ == "__main__":
    main()
