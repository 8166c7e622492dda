"""What each of eight devices computes, carries and exchanges in a training step, read from the compiled program.

No matter how a mesh is cut, a device has an eighth of the work, holds the rows and tokens of its own, and gathers
weights over fsdp, never activations, and over sequence nothing.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.cases import parametrize_some
from helpers.hlo import Program

from based_jax import parallel
from based_jax.aot import compiling
from based_jax.labels import NO_LABEL
from based_jax.nn.lm import LMConfig
from based_jax.optim import OptimConfig
from based_jax.train.compile import TrainProgram, train_program
from based_jax.train.run import TrainConfig
from based_jax.train.step import TrainState, make_train_step
from based_jax.train.tasks import TASKS

B, T, D, VOCAB = 128, 28, 32, 512
FACTOR_OF_T = 7
LAYERS = ("conv", {}), ("taylor", {"num_heads": 2, "feature_dim": 4}), ("window", {"num_heads": 2, "window": 5})
MODEL = LMConfig(
    LAYERS * 2, D, vocab_size=VOCAB, mlp_dim=80, dtype="float32", init_std=0.2, scan_layers=True, remat="dots"
)
MESHES = [
    *({"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}),
    *({"fsdp": 2, "sequence": 4}, {"data": 2, "tensor": 2, "sequence": 2}),
]
LEAST_SHARE, LARGEST_SHARE = 0.12, 0.14
"""Ideal is an eighth. Tokens in pieces have fewer pairs of a chunk, and the states that they write twice are more."""

FLOATS = "f32", "bf16", "f16"


def name_of(value):
    return "-".join(f"{k}{n}" for k, n in value.items()) if isinstance(value, dict) else str(value)


FEW = [(MESHES[2], 1), (MESHES[3], 8), (MESHES[4], 8)]
"""The cases of the ordinary suite: the hybrid meshes, which have those of one axis in them, both ways to go on."""

ALL = [(sizes, microbatches) for sizes in MESHES for microbatches in (1, 8)]
on_all_meshes = parametrize_some("sizes, microbatches", ALL, FEW, ids=name_of)
on_all_meshes_and_in_bf16 = parametrize_some(
    "sizes, microbatches, dtype",
    [*((*case, "float32") for case in ALL), *((MESHES[2], microbatches, "bfloat16") for microbatches in (1, 8))],
    [(*case, "float32") for case in FEW],
    ids=name_of,
)


def config(microbatches, dtype):
    """Return the run: two updates at a rate that moves every parameter."""
    model, optim = dataclasses.replace(MODEL, dtype=dtype), OptimConfig(lr=1e-2, schedule="constant")
    return TrainConfig(model, TASKS["mqar"](preset="tiny"), optim, batch_size=B, steps=2, microbatches=microbatches)


def batch(seed=0):
    """Return rows with 0 to T labels."""
    rng = np.random.default_rng(seed)
    inputs, labels = rng.integers(VOCAB, size=(2, B, T), dtype=np.int32)
    labels[np.arange(T) >= rng.integers(T + 1, size=(B, 1))] = NO_LABEL
    return {"inputs": inputs, "labels": labels}


@functools.cache
def program_of(microbatches, dtype="float32", **sizes) -> TrainProgram:
    """Return a run on a mesh of as many devices as the sizes say."""
    mesh = parallel.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    return train_program(config(microbatches, dtype), mesh)


@functools.cache
def compiled_step(microbatches, dtype="float32", **sizes) -> tuple[jax.stages.Compiled, list[str]]:
    """Return a step, and the lines that XLA writes on standard error while it compiles."""
    lines: list[str] = []
    with compiling.captured_stderr(lines):
        step = program_of(microbatches, dtype, **sizes).lower_step(batch()).compile()
    return step, lines


@functools.cache
def hlo(microbatches, dtype="float32", **sizes) -> Program:
    return Program(compiled_step(microbatches, dtype, **sizes)[0].as_text())


def shape_of(sizes):
    return tuple(sizes.get(axis, 1) for axis in parallel.AXES)


def rows_of(sizes):
    """Return over how many devices the rows lie."""
    return math.prod(sizes.get(axis, 1) for axis in parallel.BATCH_AXES)


def test_products_in_loops_count_as_often_as_they_run():
    """Loops in loops too, where XLA's own count takes each body once."""

    def call(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], x)

    found = jax.jit(call).lower(jnp.zeros((6, 16)), jnp.zeros((5, 16, 16))).compile()
    assert Program(found.as_text()).flops() == 3 * 5 * 2 * 6 * 16 * 16


def test_a_step_has_the_products_of_its_layers():
    assert hlo(1).flops() > 6 * B * T * sum(2 * 3 * D * 80 for _ in MODEL.layers)


@pytest.mark.long
def test_microbatches_make_the_same_products():
    assert hlo(1).flops() == hlo(8).flops()


@on_all_meshes
def test_each_device_makes_its_share_of_the_products(sizes, microbatches):
    share = hlo(microbatches, **sizes).flops() / hlo(1).flops()
    assert LEAST_SHARE <= share <= LARGEST_SHARE


@on_all_meshes
def test_scales_of_norms_are_exchanged_by_their_gradients_alone(sizes, microbatches):
    """A vector of the width is small: no device gathers one over fsdp, and none is scattered."""
    exchanged = hlo(microbatches, **sizes).exchanged(shape_of(sizes), parallel.AXES.index("fsdp"))
    moved = [x for x in exchanged if x.kind in ("all-gather", "reduce-scatter") and x.dtype in FLOATS]
    assert bool(moved) == ("fsdp" in sizes)
    assert [x for x in moved if math.prod(x.shape) <= D] == []


@on_all_meshes
def test_scans_carry_the_rows_and_tokens_of_the_device(sizes, microbatches):
    """Whatever part of the width a stream that is cut the wrong way would have."""
    widths = {(T // pieces, D // cut) for pieces in (1, 2, 4) for cut in (1, 2, 4, 8)}
    carried = hlo(microbatches, **sizes).carried()
    own = B // microbatches // rows_of(sizes), T // sizes.get("sequence", 1)
    assert {shape[-3:-1] for shape in carried if shape[-2:] in widths} == {own}


@on_all_meshes_and_in_bf16
def test_no_activation_is_summed_or_gathered_over_fsdp(sizes, dtype, microbatches):
    """Activations and logits are those with a multiple of T elements, which no parameter has."""
    params = jax.tree.leaves(program_of(microbatches, dtype, **sizes).abstract_state.params)
    assert all(leaf.size % FACTOR_OF_T for leaf in params)
    exchanged = hlo(microbatches, dtype, **sizes).exchanged(shape_of(sizes), parallel.AXES.index("fsdp"))
    found = [x for x in exchanged if x.kind in ("all-reduce", "reduce-scatter", "all-gather") and x.dtype in FLOATS]
    assert bool(found) == ("fsdp" in sizes)
    assert [x for x in found if math.prod(x.shape) % FACTOR_OF_T == 0] == []


@parametrize_some("sizes, microbatches", [case for case in ALL if "sequence" in case[0]], FEW[2:], ids=name_of)
def test_pieces_of_time_exchange_states_and_last_tokens(sizes, microbatches):
    """Those of each layer, however long a piece is; what is added up besides are gradients and the loss."""
    exchanged = hlo(microbatches, **sizes).exchanged(shape_of(sizes), parallel.AXES.index("sequence"))
    rows, heads = B // microbatches // rows_of(sizes), 2 // sizes.get("tensor", 1)
    conv, taylor, window = (rows, 3, heads * D), (rows, heads, 15, 17), (rows, 4, heads, 16)
    found = {x.shape for x in exchanged if x.kind == "collective-permute" and x.dtype in FLOATS}
    assert found == {conv, taylor, window}
    assert {x.kind for x in exchanged} == {"collective-permute", "all-reduce"}
    assert not [x for x in exchanged if x.kind == "all-reduce" and math.prod(x.shape) % FACTOR_OF_T == 0]


@parametrize_some("sizes, microbatches", [case for case in ALL if "tensor" in case[0]], FEW[1:2], ids=name_of)
def test_over_tensor_kernels_are_exchanged_and_of_activations_sums_alone(sizes, microbatches):
    """No queries, keys and values around an operation, no halves of an MLP: of a token two numbers of the head."""
    exchanged = hlo(microbatches, **sizes).exchanged(shape_of(sizes), parallel.AXES.index("tensor"))
    moved = [x for x in exchanged if x.kind != "all-reduce" and x.dtype in FLOATS]
    assert {x.kind for x in moved} <= {"all-gather", "all-to-all", "collective-permute"} and len(moved) > 1
    assert {x.shape[1:] for x in moved if math.prod(x.shape) % FACTOR_OF_T == 0} == {(2,)}


@on_all_meshes
def test_values_are_those_of_one_device(sizes, microbatches, close):
    state, metrics = two_steps(microbatches, **sizes)
    expected, expected_metrics = two_steps(1)
    close(metrics, expected_metrics, tolerance=1e-4)
    close(state.params, expected.params, tolerance=1e-3)  # Adam divides by gradients as small as rounding errors


@functools.cache
def first_state():
    return jax.device_get(program_of(1).initial_state())


@functools.cache
def two_steps(microbatches, **sizes):
    program, (step, _) = program_of(microbatches, **sizes), compiled_step(microbatches, **sizes)
    state, metrics = jax.device_put(first_state(), program.shardings), {}
    for i in range(2):
        state, metrics = step(state, parallel.Feed(program.mesh, program.config.batch_size).arrays(batch(i)))
    return jax.device_get((state, metrics))


@parametrize_some("sizes, microbatches", ALL, FEW[1:2], ids=name_of)
def test_gradients_lie_like_their_parameters(sizes, microbatches):
    """Seen through an optimizer that keeps them as its state, which nothing else places."""
    keep = optax.GradientTransformation(lambda params: params, lambda grads, _, params: (grads, grads))
    program = program_of(microbatches, **sizes)
    step = make_train_step(program.graphdef, keep, microbatches)
    params = program.abstract_state.params
    state = TrainState(params, params, program.abstract_state.step)
    with jax.set_mesh(program.mesh):
        after, _ = jax.jit(step).lower(state, program.abstract_batch(batch())).compile().output_shardings
    for grads, leaf in zip(jax.tree.leaves(after.opt_state), jax.tree.leaves(params), strict=True):
        assert grads.is_equivalent_to(leaf.sharding, leaf.ndim)


@parametrize_some("sizes, microbatches", [({"fsdp": 2, "tensor": 2}, 1), *ALL], FEW, ids=name_of)
def test_no_array_is_made_whole_only_to_be_cut_otherwise(sizes, microbatches):
    """XLA tells of those on standard error alone."""
    _, lines = compiled_step(microbatches, **sizes)
    assert [line for line in lines if compiling.REMATERIALIZED in line.lower()] == []


def test_the_optimizer_state_lies_like_the_parameters():
    state = program_of(1, data=2, fsdp=2, tensor=2).shardings
    adam = state.opt_state[1]
    leaves = list(zip(*map(jax.tree.leaves, (state.params, adam.mu, adam.nu)), strict=True))
    assert all(p == mu == nu for p, mu, nu in leaves)
    assert jax.P("tensor", "fsdp") in {p.spec for p, _, _ in leaves}
