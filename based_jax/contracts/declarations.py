"""What a mixer says of itself, and what is asked of its arrays: sizes, FLOPs, dtypes, options, axes, lanes."""

import dataclasses
import functools
import math
import typing
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from based_jax import optim, parallel
from based_jax.contracts.fitting import LONGEST, ROWS, TOKENS, Fitting, call, close, require
from based_jax.errors import UserError
from based_jax.nn.mixers import mixer_class

HUGE = 10**18
IMPOSSIBLE: dict[Any, tuple] = {int: (-1,), float: (-1.0, math.nan, math.inf), str: ("no such thing",)}
DOUBTFUL: dict[Any, tuple] = {int: (0, HUGE), float: (0.0, -0.5, 1e-30, 1e30), str: ()}
"""Values of options that are refused; and those that are refused, or right."""
BF16_TOLERANCE = 2e-2


def tells_its_state_size(fitting: Fitting) -> None:
    """`state_size` is the number of elements of the cache."""
    for seq_len in (7, 64):
        cache = jax.eval_shape(lambda seq_len=seq_len: fitting.mixer.init_cache(3, seq_len))
        sizes = [leaf.size for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        told = fitting.mixer.state_size(seq_len)
        require(
            sum(sizes) == 3 * told,
            f"state_size({seq_len}) is {told}, but the cache of a sequence has {sum(sizes) / 3:g} elements.",
        )


def tells_its_flops(fitting: Fitting) -> None:
    """`flops_per_token` covers each weight, and grows with the state."""
    mixer = fitting.mixer
    weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)) if leaf.ndim > 1)
    short, long = mixer.flops_per_token(1024), mixer.flops_per_token(4096)
    require(2 * weights <= short, f"flops_per_token is {short}, but {weights} weights are read once for each token.")
    require(short <= long, f"flops_per_token falls from {short} to {long} with the length.")
    grows = mixer.state_size(1024) < mixer.state_size(4096)
    require((short < long) == grows, "flops_per_token grows with the length where state_size does, and only there.")


def works_in_bf16(fitting: Fitting) -> None:
    """In bf16 outputs have that dtype and stay close to those in fp32, in one pass and in two.

    Half of the tokens do, relative to the mean: a norm makes as much of what is nearly nothing, and of its errors.
    """

    @jax.jit
    def in_one_pass_and_in_two(mixer, x):
        y, cache = mixer.prefill(x[:, :-1], fitting.empty())
        last, _ = mixer.step(x[:, -1], cache)
        return mixer(x), jnp.concatenate([y, last[:, None]], axis=1)

    x = jnp.asarray(fitting.normal(ROWS, TOKENS, fitting.d_model), jnp.bfloat16)
    exact = call(fitting.mixer, np.asarray(x, np.float32))
    for y in in_one_pass_and_in_two(fitting.mixer_of(dtype=jnp.bfloat16), x):
        require(y.dtype == jnp.bfloat16, f"Outputs in bf16 have dtype {y.dtype}.")
        with np.errstate(invalid="ignore", over="ignore"):
            errors = np.linalg.norm(np.asarray(y, np.float64) - exact, axis=-1)
            error = np.median(errors) / np.sqrt(np.mean(np.sum(np.square(exact), axis=-1)))
        require(error <= BF16_TOLERANCE, f"In bf16 outputs are off by {error:.2%}, more than {BF16_TOLERANCE:.0%}.")


def keeps_its_types(fitting: Fitting) -> None:
    """With 64-bit types enabled what a scan carries keeps its types, as the prefill's results do."""

    def decode(x, ids):
        mixer = fitting.build()
        _, cache = mixer.prefill(x, mixer.init_cache(ROWS, LONGEST), ids)
        return jax.lax.scan(lambda cache, x: mixer.step(x, cache)[::-1], cache, jnp.moveaxis(x, 1, 0))

    x, ids = np.ones((ROWS, 4, fitting.d_model), np.float32), np.ones((ROWS, 4), np.int64)
    with jax.enable_x64(True):
        cache, y = jax.eval_shape(decode, x, ids)
    require(y.dtype == jnp.float32, f"Outputs have dtype {y.dtype} of fp32 inputs.")
    wide = {str(leaf.dtype) for leaf in jax.tree.leaves(cache) if leaf.dtype in (jnp.float64, jnp.int64)}
    require(not wide, f"A cache has arrays of {', '.join(sorted(wide))}.")


def names_its_axes(fitting: Fitting) -> None:
    """Parameters have logical names by which a mesh divides them: "heads" or "mlp" over its axis "tensor"."""
    params, mesh = nnx.state(fitting.mixer, nnx.Param), parallel.abstract_mesh({"data": 2, "tensor": 4}, 8)
    leaves, shardings = jax.tree.leaves(params), jax.tree.leaves(parallel.shardings(params, cast(Any, mesh)))
    divided = [x.shard_shape(leaf.shape) != leaf.shape for x, leaf in zip(shardings, leaves, strict=True)]
    require(any(divided), "A mesh divides none of the parameters over its axis tensor: name their axes.")


def names_its_parameters(fitting: Fitting) -> None:
    """Each parameter is of a group of the optimizer's by its name, which says whether it decays."""
    try:
        optim.parameter_groups(nnx.state(fitting.mixer, nnx.Param))
    except UserError as error:
        require(False, str(error))


def refuses_impossible_options(fitting: Fitting) -> None:
    """Each option's impossible values are refused in a sentence that has them; others give outputs of the shape."""

    def mixed(options):
        return fitting.build(**options)(jnp.ones((1, 4, fitting.d_model)))

    config = mixer_class(fitting.kind).Config
    annotations = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        annotation = annotations[field.name]
        members = (annotation, *typing.get_args(annotation))
        type_ = next((member for member in (int, float, str) if member in members), None)
        for value in (*IMPOSSIBLE.get(type_, ()), *DOUBTFUL.get(type_, ())):
            possible = value in DOUBTFUL[type_] or field.default is None
            try:
                y = nnx.eval_shape(functools.partial(mixed, {field.name: value}))
            except UserError as error:
                told = str(value) in str(error) and str(error).endswith(".")
                require(told, f"{field.name} {value!r} is refused without the value, or in no sentence: {error}")
            else:
                require(possible, f"{field.name} is {value!r}, and is not refused.")
                right = y.shape == (1, 4, fitting.d_model)
                require(right, f"With {field.name} {value!r} outputs have shape {y.shape}.")


def trains_in_lanes(fitting: Fitting) -> None:
    """`jax.vmap` over parameters is a loop over them, as sweeps train."""
    mixers, x = [fitting.mixer_of(seed) for seed in range(3)], fitting.normal(3, 4, TOKENS, fitting.d_model)
    graphdef = nnx.graphdef(mixers[0])
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *map(nnx.state, mixers))

    def lane(params, x):
        return nnx.merge(graphdef, params)(x)

    alone = np.stack([call(mixer, x[i]) for i, mixer in enumerate(mixers)])
    close(jax.jit(jax.vmap(lane))(params, x), alone, "Outputs of several lanes")
