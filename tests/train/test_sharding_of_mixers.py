"""What eight devices exchange in a training step of each mixer, read from the compiled program."""

import functools
import math

import jax.numpy as jnp
from helpers.cases import parametrize_some
from helpers.hlo import Program
from helpers.small_mixers import SMALL

from based_jax import parallel
from based_jax.nn.lm import LMConfig
from based_jax.nn.mixers import MIXERS
from based_jax.optim import OptimConfig
from based_jax.train.compile import train_program
from based_jax.train.run import TrainConfig
from based_jax.train.tasks import TASKS

B, T, D, VOCAB = 16, 7 * 64, 16, 64
FACTOR_OF_T, DEVICES = 7, 8
FLOATS = "f32", "bf16", "f16"
ORDINARY = ("gla",)


@functools.cache
def exchanged_over_fsdp(kind):
    """Return the arrays of numbers that devices exchange in a step of two layers, forward and backward."""
    options = SMALL.get(kind, {}) | ({"l_max": T} if "l_max" in SMALL.get(kind, {}) else {})
    model = LMConfig(((kind, options),) * 2, D, vocab_size=VOCAB, dtype="float32", scan_layers=True, remat="full")
    config = TrainConfig(model, TASKS["mqar"](preset="tiny"), OptimConfig(schedule="constant"), batch_size=B, steps=1)
    mesh = parallel.make_mesh({"fsdp": DEVICES})
    rows = jnp.zeros((B, T), jnp.int32)
    program = train_program(config, mesh)
    found = Program(program.lower_step({"inputs": rows, "labels": rows, "segment_ids": rows + 1}).compile().as_text())
    sizes = tuple({"fsdp": DEVICES}.get(axis, 1) for axis in parallel.AXES)
    return [x for x in found.exchanged(sizes, parallel.AXES.index("fsdp")) if x.dtype in FLOATS]


@parametrize_some("kind", MIXERS, ORDINARY)
def test_activations_stay_where_they_are(kind):
    """Rows are not exchanged for parts of the width, whatever loops over tokens do with them.

    Activations are those with a multiple of T elements, but the gradient of a long convolution's kernel, (T, D). What
    is exchanged of them is embedded tokens, once, and their gradient.
    """
    found = exchanged_over_fsdp(kind)
    exchanged = [x for x in found if x.kind == "all-to-all"]
    assert sum(math.prod(x.shape) for x in exchanged) == 2 * B // DEVICES * T * D
    others = [x for x in found if x not in exchanged and x.shape != (T, D)]
    assert {x.kind for x in others} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert [x for x in others if math.prod(x.shape) % FACTOR_OF_T == 0] == []
