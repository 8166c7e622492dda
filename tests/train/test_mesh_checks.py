"""What a mesh cannot divide of a run is one sentence before anything is compiled, with what it could."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from based_jax import parallel, placement
from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.lm import LMConfig
from based_jax.train import opening
from based_jax.train.compile import train_program
from based_jax.train.mesh_checks import check_mesh
from based_jax.train.run import TrainConfig
from based_jax.train.tasks import TASKS

ATTENTION = {"layers": (("conv", {}), ("attention", {"num_heads": 4, "num_kv_heads": 4})), "d_model": 32}


def run(model, **values):
    model = LMConfig(**{**ATTENTION, "vocab_size": 64, "dtype": "float32", **model})
    return TrainConfig(model, TASKS["mqar"](preset="tiny"), **{"batch_size": 8, **values})


@pytest.mark.parametrize(
    ("model", "tensor", "message"),
    [
        (
            {"layers": (("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}))},
            4,
            "num_heads of model.layers[1], 'taylor', is 2, which cannot be divided over 4 devices of the mesh axis"
            " tensor; for this model that can have 1, 2.",
        ),
        (
            {"layers": (("attention", {"num_heads": 8, "num_kv_heads": 2}),)},
            8,
            "num_kv_heads of model.layers[0], 'attention', is 2, which cannot be divided over 8 devices",
        ),
        ({"mlp_dim": 42}, 4, "model.mlp_dim, or twice d_model, is 42, which cannot be divided over 4 devices"),
        (
            {"vocab_size": 66, "pad_vocab_multiple": 6},
            4,
            "model.vocab_size, padded to a multiple of pad_vocab_multiple, 6, is 66, which cannot be divided over 4",
        ),
        (
            {"layers": (("rwkv4", {}),), "d_model": 18, "mlp": "none"},
            4,
            "The axis 'heads' of 'stacks/0/blocks/0/mixer/",
        ),
    ],
)
def test_what_tensor_cannot_divide_is_named(model, tensor, message):
    mesh = parallel.make_mesh({"tensor": tensor})
    with pytest.raises(UserError) as error:
        train_program(run(model), mesh)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_what_it_can_divide_is_let_through(tensor):
    mesh = parallel.make_mesh({"tensor": tensor})
    assert check_mesh(run({}), mesh) is None
    assert check_mesh(run({"mlp_dim": 41}), parallel.make_mesh({})) is None


def test_rows_per_device_become_a_batch_on_the_mesh():
    config = run({}, rows_per_device=3, microbatches=3)
    for sizes, rows in (({}, 24), ({"tensor": 2}, 12), ({"fsdp": 2, "tensor": 4}, 6)):
        sized = config.sized(parallel.make_mesh(sizes))
        assert sized == dataclasses.replace(config, batch_size=rows, rows_per_device=None)
        assert sized.sized(parallel.make_mesh({})) is sized
    with pytest.raises(UserError, match=r"^4 rows of a microbatch .* over 8 .*: microbatches can be 2\.$"):
        train_program(run({}, rows_per_device=2, microbatches=4), parallel.make_mesh())
    with pytest.raises(UserError, match=r"rows_per_device 2 comes to 16 rows on this mesh, .* into 3 microbatches"):
        train_program(run({}, rows_per_device=2, microbatches=3), parallel.make_mesh())


def test_what_stays_whole_is_a_line_when_a_run_begins():
    low_rank = nnx.Param(jax.ShapeDtypeStruct((2**12, 2**7), jnp.float32), **layers.logical_axes("embed", None))
    lines = opening.whole_lines({"low_rank": low_rank}, parallel.make_mesh({"fsdp": 2, "tensor": 4}))
    assert lines == ["not divided over tensor: 4 devices hold the same 1.0 MiB each of 'low_rank'"]
    assert opening.whole_lines({"low_rank": low_rank}, parallel.make_mesh({"fsdp": 8})) == []


def test_what_is_too_small_to_be_divided_is_one_line(monkeypatch):
    monkeypatch.setattr(placement, "SMALL_BYTES", 2**16)
    scale, stack = (
        nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), **layers.logical_axes(*names))
        for names, shape in ((("embed",), (2**13,)), (("layers", "embed"), (24, 2**13)))
    )
    params = {"norm": scale, "stack": stack, "wide": abstract_kernel()}
    lines = opening.whole_lines(params, parallel.make_mesh({"fsdp": 8}))
    assert lines == ["not divided over fsdp: 2 parameters of less than 64 KiB a layer, 0.8 MiB together"]
    deep = nnx.Param(jax.ShapeDtypeStruct((64, 2**13), jnp.float32), **layers.logical_axes("layers", "embed"))
    lines = opening.whole_lines({"deep": deep}, parallel.make_mesh({"fsdp": 8}))
    assert lines == ["not divided over fsdp: 8 devices hold the same 2.0 MiB each of 'deep'"]
    assert opening.whole_lines(params, parallel.make_mesh({"data": 8})) == []


def abstract_kernel():
    return nnx.Param(jax.ShapeDtypeStruct((2**10, 2**10), jnp.float32), **layers.logical_axes("embed", "mlp"))
