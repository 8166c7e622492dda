"""Every operation of the reference configs runs in kernels on a Hopper GPU: traced for one, not compiled."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.devices import gpus

from based_jax import config as configs
from based_jax.nn.lm import LM
from based_jax.ops import dispatch
from based_jax.train.run import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"
ROWS = 8
NO_MIXER = "linear_cross_entropy"
"""Which keeps its logits where there is room: that is faster, and no fallback."""


def choices(config):
    """Return the implementations by operation on packed text, of one of each layer: more of them are the same calls."""
    different = tuple(dict.fromkeys((kind, tuple(options.items())) for kind, options in config.model.layers))
    layers = [(kind, dict(options)) for kind, options in different]
    values = configs.to_dict(config.model) | {"layers": layers, "scan_layers": False, "remat": "none"}
    model = configs.build(type(config.model), values)
    ids = jax.ShapeDtypeStruct((ROWS, config.data.seq_len), jnp.int32)
    with dispatch.recorded_choices() as found, gpus():
        jax.eval_shape(lambda ids: LM(model, rngs=nnx.Rngs(0)).hidden(ids, jnp.ones_like(ids)), ids)
    return found


def variants():
    for path in sorted(CONFIGS.glob("*.py")):
        if path.stem not in ("recipe", "mqar_tiny", "text_tiny"):
            yield from (f"{path.name}:{size}" for size in ("360m", "1b") if f'"{size}":' in path.read_text())


@pytest.mark.parametrize("name", [*variants()])
def test_every_operation_runs_in_kernels(name):
    found = choices(configs.build(TrainConfig, configs.load(f"{CONFIGS / name}")))
    left = {
        operation
        for operation, impls in found.items()
        if operation != NO_MIXER and any(dispatch.backend_of(impl) in ("xla", "oracle") for impl in impls)
    }
    assert found and not left
