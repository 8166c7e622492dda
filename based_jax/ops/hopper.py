"""What every operation with a Mosaic GPU kernel asks before it runs one, and how it calls it.

The kernels are for Hopper GPUs alone. To XLA they are opaque: under a mesh they run per shard, in `jax.shard_map`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from based_jax.ops.dispatch import target_device_kind

DEVICES = re.compile(r"\bG?H(100|200|800|20)\b")
OFFSETS = 2**31
"""Kernels that read an array other than by tiles count its elements in 32 bits."""
CHUNK = 64
"""Tokens that a kernel reads together."""
ROWS = 8
"""Tokens of a copy's smallest tile: other lengths are padded."""


def refusal() -> str | None:
    """Return why no kernel can run here, whatever its arguments, or None."""
    if not DEVICES.search(target_device_kind()):
        return f"the kernels are for Hopper GPUs, and this is {target_device_kind()}"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types):
        return f"a mesh of {mesh.size} devices needs jax.shard_map around the call"
    return None


def call(kernel: Callable[..., Sequence[jax.Array]], *arguments: Any, **options: Any) -> list[jax.Array]:
    """Return a kernel's results; under `jax.shard_map` they vary over the mesh axes that an array given varies over."""
    given = vary_alike(*arguments, *options.values())
    options = dict(zip(options, given[len(arguments) :], strict=True))
    results = kernel(*given[: len(arguments)], **options)
    return vary_alike(*results, like=given)


def vary_alike(*values: Any, like: Sequence[Any] = ()) -> list[Any]:
    """Return the values with the arrays among them varying over all mesh axes that one of them, or of `like`, does.

    Arguments of a `jax.custom_vjp` need it: the gradient of one that varies less must be summed over the devices.
    """
    axes = frozenset().union(*(_varying(x) for x in (*values, *like)))

    def vary(x: Any) -> Any:
        missing = tuple(sorted(axes - _varying(x))) if isinstance(x, jax.Array) else ()
        return lax.pcast(x, missing, to="varying") if missing else x

    return [vary(x) for x in values]


def pad_time(*arrays: jax.Array) -> list[jax.Array]:
    """Return (B, T, H, .) arrays with zeros after the last token, to a length that copies can take."""
    time = arrays[0].shape[1]
    filler = max(CHUNK, -(-time // ROWS) * ROWS) - time
    return [jnp.pad(x, ((0, 0), (0, filler), (0, 0), (0, 0))) for x in arrays]


def _varying(x: Any) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying if isinstance(x, jax.Array) else frozenset()
