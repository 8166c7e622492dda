"""How a Triton kernel is called, through jax-triton: for lanes of `jax.vmap` and under `jax.shard_map` as well."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
from jax import lax
from jax.custom_batching import custom_vmap
from jax.interpreters import mlir
from jax_triton import triton_lib
from jaxlib.mlir import ir

from pallas_kernels.gpus import GpuModels, models_of

Type = jax.ShapeDtypeStruct

LEAST_SHARED_BYTES = 64 << 10
"""Of any GPU, AMD's included."""
TYPED_CALL = 4
"""XLA's version of a custom call whose attributes have names."""


def launch(
    kernel: Any,
    programs: int,
    arguments: Sequence,
    results: Sequence[Type | None],
    *,
    warps: int,
    stages: int = 1,
    **constants,
) -> list[jax.Array]:
    """Run so many programs of a kernel for each row, and return its results.

    Args:
      kernel: a `triton.jit` function of pointers to the arguments, pointers to the results, and `constants`. Program
        `tl.program_id(0)` is the one numbered by its remainder by `programs`, of the row numbered by the quotient.
        Profiles know it by the function's name.
      arguments, results: arrays and types, (rows, ...); of results every element is to be written. None is one that the
        kernel does not touch; it returns nothing for it.
      warps: of a program.
      stages: of its loops' loads.
    """
    arguments = [arguments[0] if x is None else x for x in arguments]
    untouched, given = Type((arguments[0].shape[0], 1), jnp.float32), [x is not None for x in results]
    types = [untouched if x is None else x for x in results]

    @custom_vmap
    def run(*arrays):
        return _run(kernel, programs, arrays, types, num_warps=warps, num_stages=stages, **constants)

    @run.def_vmap
    def run_lanes(lanes, batched, *arrays):
        """Take lanes for rows."""
        arrays = [x if own else _repeated(x, lanes) for x, own in zip(arrays, batched, strict=True)]
        rows = [x.reshape(-1, *x.shape[2:]) for x in arrays]
        of_lanes = [Type((lanes * x.shape[0], *x.shape[1:]), x.dtype) for x in types]
        made = launch(kernel, programs, rows, of_lanes, warps=warps, stages=stages, **constants)
        return [x.reshape(lanes, *like.shape) for x, like in zip(made, types, strict=True)], [True] * len(made)

    return [*itertools.compress(run(*arguments), given)]


def _run(kernel, programs, arrays, results, **options) -> list[jax.Array]:
    axes = tuple(jax.typeof(arrays[0]).manual_axis_type.varying)  # of `jax.shard_map`; all arguments vary alike
    grid = (arrays[0].shape[0] * programs,)
    call = functools.partial(jax_triton.triton_call, kernel=kernel, name=kernel.__name__, grid=grid)
    with jax.named_scope(kernel.__name__):
        made = call(*arrays, out_shape=list(results), compute_capability=_capability(), **options)
    return [lax.pcast(x, axes, to="varying") if axes else x for x in made]


def _lowered(ctx, *arrays, **options):
    """Lower a call as jax-triton does, but to one that XLA makes ready beforehand and takes into its CUDA graphs.

    jax-triton 0.4 does so by itself, and asks for a later Triton.
    """
    made = triton_lib.triton_kernel_call_lowering(triton_lib.get_cuda_backend, ctx, *arrays, **options)
    call = made[0].owner.attributes
    opaque = ir.StringAttr.get(call["backend_config"].value_bytes)
    call["backend_config"] = ir.DictAttr.get({"opaque": opaque})
    call["call_target_name"] = ir.StringAttr.get("triton_kernel_call_ffi")
    call["api_version"] = mlir.i32_attr(TYPED_CALL)
    return made


mlir.register_lowering(triton_lib.triton_kernel_call_p, _lowered, platform="cuda")


def _repeated(x: jax.Array, lanes: int) -> jax.Array:
    return jnp.broadcast_to(x, (lanes, *x.shape))


def shared_bytes() -> int:
    """Return what the programs of a multiprocessor share of the GPU that is being compiled for."""
    models = _models()
    return models.shared_bytes if models else LEAST_SHARED_BYTES


def _capability() -> int | None:
    """Return that of what is compiled for; None where it is not known, and jax-triton asks this host."""
    models = _models()
    return models.capability if models else None


def _models() -> GpuModels | None:
    """Return what is known of the mesh's GPUs, or of this host's."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return models_of(device.device_kind)
