"""How an operation is computed under a mesh (`jax.set_mesh`): every device runs it on its part of the arrays.

To XLA kernels are opaque, and a loop over tokens it may divide otherwise than the arrays that it reads lie, which are
then exchanged. Rows of the batch go over the mesh axes `parallel.BATCH_AXES`, tokens over `parallel.TIME_AXES`, heads
over `parallel.HEAD_AXES`, as `based_jax.parallel` places them, and a table's tokens and widths by
`parallel.PARAMETER_RULES`. What devices with pieces of the same rows tell each other stands here too (`before`,
`from_last`); what operations do with it, in `ops/sequence.py`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from based_jax.ops import dimensions
from based_jax.ops.dimensions import Names
from based_jax.parallel import BATCH_AXES, HEAD_AXES, PARAMETER_RULES, TIME_AXES, channel_pieces, free_axes

MESH_AXES = {
    "batch": BATCH_AXES,
    "time": TIME_AXES,
    "tokens": BATCH_AXES + TIME_AXES,  # of all rows, in one dimension
    "heads": HEAD_AXES,
    "groups": HEAD_AXES,  # of heads, one or as many as heads
    "vocab": (PARAMETER_RULES["vocab"],),
    "embed": (PARAMETER_RULES["embed"],),
}


def mesh_refusal() -> str | None:
    """Return why `per_shard` cannot call a kernel on this mesh, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and AxisType.Explicit in mesh.axis_types:
        return f"a mesh of {mesh.size} devices with explicit axes needs jax.shard_map around the call"
    return None


def varying_refusal(call: Any) -> str | None:
    """Return why a kernel that `jax.shard_map` cannot check may not run a call, a tree of arrays, in one, or None.

    It is one that writes where an argument lies, or a library's.
    """
    if any(_varying(x) for x in jax.tree.leaves(call)):
        return "its results do not say over which devices of jax.shard_map they vary"
    return None


def per_shard(
    function: Callable,
    arguments: Sequence[Any],
    names: Sequence[Names],
    results: Sequence[Names],
    **options: Any,
) -> Any:
    """Return `function(*arguments)`, run by every device of the mesh on its part of the arrays.

    Args:
      arguments: arrays, trees of them that share their names, and None for what is not given.
      names: for each argument the name of each of its first dimensions, a key of `MESH_AXES` or None; a dimension that
        its mesh axes do not divide, and one without a name, stays whole.
      results: the same for the results, one or a tuple.
      options: of `jax.shard_map`: a kernel may not say over which devices its results vary, and need `check_vma=False`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = free_axes(mesh)
    if mesh.size == 1 or not free:
        return function(*arguments)
    given = [(x, dims) for x, dims in zip(arguments, names, strict=True) if x is not None]
    sizes: dict[str, list[int]] = {}
    for x, dims in given:
        for leaf in jax.tree.leaves(x):
            for name, size in zip(dims, leaf.shape, strict=False):
                if name is not None:
                    sizes.setdefault(name, []).append(size)
    axes = {name: _dividing(mesh, name, found) for name, found in sizes.items()}

    def spec(dims: Names) -> PartitionSpec:
        return PartitionSpec(*(axes.get(name) if name else None for name in dims))

    def on_device(*parts: Any) -> Any:
        rest = iter(parts)
        return function(*(None if x is None else next(rest) for x in arguments))

    specs = tuple(spec(dims) for _, dims in given)
    out = tuple(map(spec, results)) if len(results) > 1 else spec(results[0])
    shared = jax.shard_map(on_device, in_specs=specs, out_specs=out, axis_names=free, **options)
    return shared(*(x for x, _ in given))


def by_channels(
    function: Callable,
    arguments: Sequence[Any],
    dimensions: Sequence[int | None],
    results: Sequence[int],
    channels: int,
) -> Any:
    """Return `function(*arguments)`, run by every device along `HEAD_AXES` on its share of the channels.

    For operations on several halves or parts of a projection that each device has of its own, joined; rows and tokens
    stay XLA's to divide, or those of kernels within.

    Args:
      arguments: arrays, trees of them, and None for what is not given.
      dimensions: of each argument the one that has channels; None where it is whole.
      results: the same of the results.
      channels: of each part, which the devices divide, or they all have the whole.
    """
    if channel_pieces(channels) == 1:
        return function(*arguments)

    def spec(dimension: int | None) -> PartitionSpec:
        return PartitionSpec() if dimension is None else PartitionSpec(*(None,) * dimension, HEAD_AXES)

    specs = tuple(map(spec, dimensions))
    # What a shard_map within keeps for its gradient would else be told to lie over these axes twice.
    options: dict[str, Any] = {"axis_names": set(HEAD_AXES), "check_vma": False}
    shared = jax.shard_map(function, in_specs=specs, out_specs=tuple(map(spec, results)), **options)
    return shared(*arguments)


def per_device(function: Callable, call: Any, **options: Any) -> Any:
    """Return `function(call)`, run by every device for its rows, its piece of time and its heads (`dimensions.py`).

    For options see `per_shard`.
    """
    names, results = dimensions.of(call)

    def on_device(*parts: Any) -> Any:
        leaves, tree = jax.tree.flatten(parts)
        alike = jax.tree.unflatten(tree, vary_alike(*leaves))  # else a loop sums a parameter's gradient at each step
        return function(call._replace(**dict(zip(names, alike, strict=True))))

    return per_shard(on_device, [getattr(call, name) for name in names], list(names.values()), results, **options)


def heads_of_device(rows: int, heads: int) -> int:
    """Return how many heads of all rows each device gets in `per_device`."""
    return part_of_device("batch", rows) * part_of_device("heads", heads)


def axes_of(dimension: str, size: int) -> tuple[str, ...]:
    """Return the mesh axes over which `per_shard` divides a dimension of `MESH_AXES`, none where it stays whole."""
    mesh = jax.sharding.get_abstract_mesh()
    return (_dividing(mesh, dimension, [size]) or ()) if mesh.size > 1 else ()


def part_of_device(dimension: str, size: int) -> int:
    """Return how much of a dimension of `MESH_AXES` each device gets in `per_shard`."""
    mesh = jax.sharding.get_abstract_mesh()
    return size // math.prod(mesh.shape[name] for name in axes_of(dimension, size))


def pieces_of_time(tokens: int) -> int:
    """Return into how many pieces `per_shard` cuts time."""
    return tokens // part_of_device("time", tokens)


def flattened(x: jax.Array, dimensions: int) -> jax.Array:
    """Return x with its first dimensions as one; of rows and tokens (B, T, ...) each device keeps its own.

    In the order of `reshape` a device with pieces of several rows would have to give them away.
    """
    shape, rest = x.shape[:dimensions], x.shape[dimensions:]
    parts = _rows_and_pieces(shape)
    return x.reshape(-1, *rest) if parts is None else x.reshape(*parts, *rest).swapaxes(1, 2).reshape(-1, *rest)


def unflattened(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return what `flattened` has made of an array with this shape in those dimensions."""
    if (parts := _rows_and_pieces(shape)) is not None:
        rows, of_rows, pieces, of_time = parts
        x = x.reshape(rows, pieces, of_rows, of_time, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(*shape, *x.shape[4:])
    return x.reshape(*shape, *x.shape[1:])


def _rows_and_pieces(shape: Sequence[int]) -> tuple[int, int, int, int] | None:
    """Return into how many parts rows and time are cut, each with what a part has; None where time is not cut."""
    if len(shape) != 2 or (pieces := pieces_of_time(shape[1])) == 1:
        return None
    of_rows = part_of_device("batch", shape[0])
    return shape[0] // of_rows, of_rows, pieces, shape[1] // pieces


# Within `per_shard`, of time that is cut:


def place_in_time() -> jax.Array:
    """Return which piece of time this device has, from 0."""
    return lax.axis_index(TIME_AXES)


def count_in_time() -> int:
    """Return how many pieces there are."""
    return lax.axis_size(TIME_AXES)


def before(join: Callable[[Any, Any], Any], own: Any) -> Any:
    """Return what the devices with the pieces of time before this one have, joined in their order; zeros on the first.

    `join(earlier, later)` is associative. In n pieces a device sends as many bytes as it has 1 + log2(n - 1) times.
    """
    place, count, distance = place_in_time(), count_in_time(), 1
    total = from_before(own, 1)
    while distance < count - 1:
        joined = join(from_before(total, distance), total)
        reaches = place > distance
        total = jax.tree.map(lambda new, old, use=reaches: jnp.where(use, new, old), joined, total)
        distance *= 2
    return total


def from_before(own: Any, distance: int) -> Any:
    """Return what the device has whose piece stands so many pieces before; zeros where there is none."""
    pairs = [(i, i + distance) for i in range(count_in_time() - distance)]
    return jax.tree.map(lambda x: lax.ppermute(x, TIME_AXES, pairs), own)


def handed_on(own: Any) -> Any:
    """Return what the device with the piece before has, and on the first one what the last has."""
    count = count_in_time()
    pairs = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: lax.ppermute(x, TIME_AXES, pairs), own)


def heads_for_time(x: jax.Array) -> jax.Array:
    """Return all tokens (B, T, H / pieces, .) of this device's share of the heads, given a piece of all heads'."""
    return lax.all_to_all(x, TIME_AXES, 2, 1, tiled=True)


def time_for_heads(x: jax.Array) -> jax.Array:
    """Return what `heads_for_time` is given."""
    return lax.all_to_all(x, TIME_AXES, 1, 2, tiled=True)


def all_of_time(x: jax.Array) -> jax.Array:
    """Return what all devices have of rows (B, T, ...), in order of time."""
    return lax.all_gather(x, TIME_AXES, axis=1, tiled=True)


def from_last(own: Any) -> Any:
    """Return what the device with the last piece of time has."""
    last = place_in_time() == count_in_time() - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(last, x, 0), TIME_AXES), own)


def _dividing(mesh: AbstractMesh, dimension: str, sizes: Sequence[int]) -> tuple[str, ...] | None:
    """Return the free mesh axes for a dimension, of `MESH_AXES`, if together they divide all sizes, or None."""
    names = free_axes(mesh) & set(MESH_AXES[dimension])
    axes = tuple(name for name in mesh.axis_names if name in names and mesh.shape[name] > 1)
    devices = math.prod(mesh.shape[name] for name in axes)
    return axes if axes and all(size % devices == 0 for size in sizes) else None


def launch(kernel: Callable[..., Sequence[jax.Array]], *arguments: Any, **options: Any) -> list[jax.Array]:
    """Run a kernel; under `jax.shard_map` its results vary over the mesh axes that an array given varies over."""
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


def fill(x: jax.Array, multiples: dict[int, int]) -> jax.Array:
    """Append zeros to dimensions up to a multiple."""
    return jnp.pad(x, [(0, -size % multiples.get(dimension, 1)) for dimension, size in enumerate(x.shape)])


def _varying(x: Any) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying if isinstance(x, jax.Array) else frozenset()
