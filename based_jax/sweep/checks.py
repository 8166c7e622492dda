"""What is impossible about a point of a sweep, found before the first one is trained."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from based_jax.errors import UserError
from based_jax.nn.lm import LM, LMConfig
from based_jax.optim import schedule
from based_jax.sweep.points import Point, shown
from based_jax.train.run import RunConfig


@functools.cache
def abstract_model(config: LMConfig) -> LM:
    """Return a model without arrays, to be read alone."""
    return nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))


def check_pass(config: RunConfig, steps: int, seq_len: int, mesh: Mesh | None = None) -> None:
    """Trace a pass of a config's model over a batch of rows of this length, and make its schedule.

    Raises:
      UserError: an operation cannot run, or the schedule does not fit the steps; other errors as of tracing.
    """
    schedule(config.optim, steps)
    graphdef, params = nnx.split(abstract_model(config.model))
    tokens = jax.ShapeDtypeStruct((config.batch_size, seq_len), jnp.int32)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        jax.eval_shape(lambda params, tokens: nnx.merge(graphdef, params).hidden(tokens), params, tokens)


def check_groups(groups: Sequence[Sequence[tuple[Point, Any]]], check: Callable[[Any], None]) -> None:
    """Check one config of each group of points that are possible together, or none of them.

    Raises:
      UserError: for all that are impossible, the first of them with the reason.
    """
    wrong: list[tuple[Point, str]] = []
    for group in groups:
        try:
            check(group[0][1])
        except Exception as error:  # what cannot be traced cannot be trained
            wrong += [(point, reason(error)) for point, _ in group]
    if wrong:
        raise impossible(wrong, sum(map(len, groups)))


def impossible(wrong: Sequence[tuple[Point, str]], number: int) -> UserError:
    """Return the error for points of so many, each with its reason."""
    point, why = wrong[0]
    return UserError(f"{len(wrong)} of {number} points cannot be trained, first {shown(point)}: {why}")


def reason(error: Exception) -> str:
    """Return in one line what an error says; of errors that are not about input the kind as well."""
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}."
