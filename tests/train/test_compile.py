"""What a config compiles to, for devices that are there and for those that are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.nn.lm import LMConfig
from based_jax.optim import OptimConfig
from based_jax.train.compile import train_program
from based_jax.train.run import TrainConfig
from based_jax.train.tasks import TASKS

LAYERS = (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}))


def config(**changes):
    model = LMConfig(LAYERS, 16, vocab_size=64, dtype="float32")
    return TrainConfig(model, TASKS["mqar"](preset="tiny"), OptimConfig(warmup_steps=0), **{"batch_size": 8, **changes})


def batch(rows):
    return {name: np.zeros((rows, 16), np.int64) for name in ("inputs", "labels")}


def no_device(*args, **kwargs):
    raise AssertionError("a device was asked for")


def test_a_step_is_lowered_for_a_mesh_without_asking_for_a_device(monkeypatch):
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    for name in ("devices", "local_devices", "device_count", "local_device_count", "device_put"):
        monkeypatch.setattr(jax, name, no_device)
    program = train_program(config(), mesh)
    found = program.lower_step(batch(2))
    assert "num_partitions = 4" in found.as_text()
    monkeypatch.undo()
    assert found.compile().output_shardings[0].params.embed.embedding.get_value().spec == jax.P("tensor", "fsdp")


def test_the_abstract_batch_is_the_global_one():
    """Whatever part of its rows a host holds, and in the dtype that JAX gives them."""
    program = train_program(config(), parallel.make_mesh())
    shapes = program.abstract_batch(batch(2))
    assert {(x.shape, x.dtype, x.sharding.spec) for x in shapes.values()} == {
        ((8, 16), jnp.dtype("int32"), jax.P(parallel.BATCH_AXES, parallel.TIME_AXES))
    }


def test_the_state_is_what_the_abstract_one_says():
    program = train_program(config(), parallel.make_mesh({"fsdp": 4, "tensor": 2}))
    state = program.initial_state()
    assert jax.tree.structure(state) == jax.tree.structure(program.abstract_state)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 12},
            r"^batch_size 12 cannot be divided over 8 devices of the mesh axes data and fsdp; it is a multiple of 8\.$",
        ),
        (
            {"batch_size": 48, "microbatches": 4},
            r"^12 rows of a microbatch cannot be .*: microbatches can be 2\.$",
        ),
    ],
)
def test_rows_that_the_mesh_cannot_divide_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        train_program(config(**changes), parallel.make_mesh())
