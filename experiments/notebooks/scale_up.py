# %% [markdown]
# # Scale up: the same config on eight devices, and on a pod that is not here
#
# A mesh says how many devices go to rows of the batch (`data`), to parameters that are gathered when needed (`fsdp`),
# to heads and widths (`tensor`) and to time (`sequence`). The config stays as it is. Here the eight devices are
# made of this host's CPU.

# %% tags=["parameters"]
d_model = 256
steps = 3

# %%
import os

os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before jax is used

import json
from pathlib import Path

import jax
import pandas as pd

from based_jax import load_config, parallel
from based_jax.optim import path_of
from based_jax.train.compile import train_program

print(len(jax.devices()), "devices")

# %%
overrides = {"model.d_model": d_model, "model.layers": (("conv", {}), ("taylor", {"num_heads": 4, "feature_dim": 8}))}
config = load_config("../../configs/mqar_tiny.py:taylor_8", overrides | {"batch_size": 16})
mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
program = train_program(config, mesh)

# %% [markdown]
# ## How parameters lie
#
# Parameters are placed by the logical names of their axes. Small ones stay whole over `fsdp`.

# %%
state = program.initial_state()
leaves = jax.tree_util.tree_leaves_with_path(state.params)
rows = [
    {
        "parameter": path_of(keys).removesuffix("/value"),
        "shape": leaf.shape,
        "of a device": leaf.sharding.shard_shape(leaf.shape),
        "axes": str(leaf.sharding.spec),
    }
    for keys, leaf in leaves
    if leaf.ndim > 1
]
pd.DataFrame(rows)

# %%
by_name = {path_of(keys): leaf for keys, leaf in leaves}
embedding = next(leaf for name, leaf in by_name.items() if "embedding" in name)
print("the embedding, tokens by width:")
jax.debug.visualize_array_sharding(embedding)

# %% [markdown]
# ## How a batch lies
#
# Rows go over `data` and `fsdp`; both devices of `tensor` have the same ones.

# %%
source = config.data.open(config.batch_size)


def placed(batch, mesh):
    """Return a batch with its rows over the mesh."""
    return {name: jax.device_put(x, parallel.batch_sharding(mesh, x.shape)) for name, x in batch.items()}


batch = placed(source.batch(0), mesh)
print("the tokens, rows by time:")
jax.debug.visualize_array_sharding(batch["inputs"])

# %% [markdown]
# ## The step, and what devices say to each other

# %%
compiled = program.lower_step(source.batch(0)).compile()
memory = compiled.memory_analysis()
held, more = memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20
print(f"a device holds {held:.1f} MiB of the state and the batch, and {more:.1f} MiB while it computes")
kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
text = compiled.as_text()
print({kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds})
for t in range(steps):
    state, metrics = program.step(state, placed(source.batch(t), mesh))
    print(f"step {t}: loss {float(metrics['loss']):.4f}")

# %% [markdown]
# One device computes the same:

# %%
alone = train_program(config, parallel.make_mesh(devices=jax.devices()[:1]))
single = alone.initial_state()
for t in range(steps):
    single, metrics = alone.step(single, placed(source.batch(t), alone.mesh))
    print(f"step {t}: loss {float(metrics['loss']):.4f}")

# %% [markdown]
# ## A pod that is not here
#
# `python -m based_jax aot --config=configs/based.py:1b --topology=v5e:16x16 --mesh=data:16,fsdp:16` compiles the step
# for 256 TPUs on a CPU (with the extra `tpu`) and appends a row of what it needs. These rows are committed
# (`experiments/pods`), 40 of them.

# %%
reports = [json.loads(line) for line in Path("../pods/results/pods.jsonl").read_text().splitlines()]
pd.DataFrame(
    {
        "config": row["config"].removeprefix("configs/"),
        "program": row["program"],
        "topology": row["topology"],
        "mesh": row["mesh"],
        "GiB of a device": row["memory"]["peak"] / 2**30,
    }
    for row in reports[:8]
).round(2)

# %% [markdown]
# One of them read: what a device holds and exchanges, and what a step would take if each of these were all of it.

# %%
report = next(row for row in reports if row["program"] == "train")
print(report["command"])
print({name: f"{size / 2**30:.2f} GiB" for name, size in report["memory"].items()})
print({name: f"{seconds * 1e3:.0f} ms" for name, seconds in report["seconds"].items()}, "bound by", report["bound"])
print(f"{report['estimate']['tokens_per_second']:,.0f} tokens/s, an estimate if nothing overlaps")
pd.DataFrame(report["exchanged"])
