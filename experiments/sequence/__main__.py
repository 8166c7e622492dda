"""What devices hold and exchange whose tokens are pieces of the same rows: compiled for CPU devices, and not run.

python -m experiments.sequence memory --out=experiments/sequence/results/memory.jsonl
python -m experiments.sequence mixers --out=experiments/sequence/results/mixers.jsonl
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from based_jax import parallel
from based_jax.aot.collectives import by_axis, collectives
from based_jax.aot.compiling import memory_of
from based_jax.aot.costs import flops
from based_jax.aot.hlo import Program
from based_jax.bench import rows
from based_jax.nn.mixers import MIXERS, make_mixer
from based_jax.train.compile import train_program
from based_jax.train.run import load_config

TOKENS, DEVICES = 1 << 20, (2, 4, 8)
PATTERN = (("conv", {}), ("taylor", {}), ("window", {"window": 129}))
ROW = {"model.layers": PATTERN, "data.seq_len": TOKENS, "batch_size": 1, "microbatches": 1, "optim.warmup_steps": 0}

WIDTH, LENGTH = 256, 4096
WHOLE = ("hyena", "implicit_conv", "long_conv")
"""Mixers that are refused."""


def memory() -> Iterator[dict]:
    """Yield a training step of a row of 1,048,576 tokens on 2, 4 and 8 devices."""
    for devices in DEVICES:
        mesh = parallel.make_mesh({"sequence": devices}, jax.devices()[:devices])
        program = train_program(load_config("configs/based.py:360m", ROW | {"mesh.sequence": devices}), mesh)
        row = np.zeros((1, TOKENS), np.int32)
        compiled = program.lower_step({"inputs": row, "labels": row, "segment_ids": row}).compile()
        temporaries = memory_of(compiled).temporaries / 2**30
        yield {"tokens": TOKENS, "devices": devices, "temporaries_gib": round(temporaries, 2)} | costs(compiled, mesh)


def mixers() -> Iterator[dict]:
    """Yield a mixer's forward and backward pass on 8 devices beside that on one."""
    for kind in MIXERS:
        if kind not in WHOLE:
            whole, cut = (costs(*passes(kind, devices)) for devices in (1, 8))
            share = cut["tflops"] / whole["tflops"] if whole["tflops"] else None
            yield {"mixer": kind, "d_model": WIDTH, "tokens": LENGTH, "devices": 8, "share": share} | cut


def passes(kind: str, devices: int) -> tuple[jax.stages.Compiled, Mesh]:
    """Return a mixer's passes over one row, compiled for devices that hold pieces of it."""
    graphdef, params = nnx.split(make_mixer(kind, WIDTH, rngs=nnx.Rngs(0)))
    mesh = parallel.make_mesh({"sequence": devices}, jax.devices()[:devices])
    shape = (1, LENGTH, WIDTH)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=parallel.batch_sharding(mesh, shape))

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x) ** 2)

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile(), mesh


def costs(compiled: jax.stages.Compiled, mesh: Mesh) -> dict:
    """Return the products of a device, and what it sends other than sums of gradients."""
    program = Program(compiled.as_text())
    sent = [x for x in by_axis(collectives(program), mesh) if x.kind != "all-reduce"]
    return {
        "tflops": round(flops(program) / 1e12, 6),
        "sent_mib": round(sum(x.bytes for x in sent) / 2**20, 3),
        "kinds": sorted({x.kind for x in sent}),
    }


TABLES = {"memory": memory, "mixers": mixers}


def main() -> None:
    """Make the rows of a table; print each as it comes, and write it to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines that are written anew")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    with rows.replaced(args.out) as write:
        for row in TABLES[args.table]():
            print(row, flush=True)
            write(row | rows.facts("flax"))


if __name__ == "__main__":
    main()
