"""The calls that are compiled, for which chips and in which forms; as a command one of them, whose row it prints."""

import functools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from based_jax import devices
from based_jax.aot import topology
from based_jax.ops import delta_rule, taylor_decode
from based_jax.revision import revision
from experiments.tpu import schedules

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "v7x:2x2x1"}
CORES = {"v5p": 2}
"""Over which the programs of one of JAX's devices are divided, where they are several."""
CYCLES = re.compile(r'^ +(?:ROOT )?%\S+ = .*? (?:fusion|convolution)\(.*"estimated_cycles":"(\d+)"', re.MULTILINE)
COPIED = re.compile(r"= \w+\[([\d,]+)\]\S* copy\(")


class Call(NamedTuple):
    """What is compiled.

    Attributes:
      function: of the implementation and the arguments, the last of which is the state.
      arguments: a function that makes them.
      moved_bytes: what has to be read or written of the state, once.
      state: its shape.
      kernel: the name of the kernel.
      cycles: of all its programs, by their schedule.
    """

    function: Callable
    arguments: Callable[[], tuple]
    moved_bytes: float
    state: tuple[int, ...]
    kernel: str
    cycles: Callable[[schedules.Schedule], int]


def taylor(dtype: str, rows: int = 128, heads: int = 16, keys: int = 16, values: int = 112, room: int = 16) -> Call:
    """Return a token of Taylor attention that adds nothing to the state."""
    from pallas_kernels.tpu import taylor_decode as kernels

    plan = kernels.Plan(rows, heads, 1, keys, values, room, jnp.dtype(dtype), jnp.dtype(jnp.bfloat16))
    features, turn = plan.features, kernels.largest_divisor(plan.chunk, kernels.MAX_UNROLLED)

    def arguments():
        q, v = (jnp.zeros((rows, 1, heads, dim), jnp.bfloat16) for dim in (keys, values))
        form = {"flush": room, "state_dtype": dtype, "dtype": jnp.dtype(jnp.bfloat16)}
        return q, q, v, taylor_decode.initial_state(rows, heads, keys, values, **form)

    def cycles(schedule: schedules.Schedule) -> int:
        """Count the loops over features and over all recent tokens as often as they run, and no others."""
        of_features = max(loop.own for loop in schedule.loops if not loop.inner)
        of_tokens = schedule.loops[-2].own * room // kernels.MAX_UNROLLED_TOKENS
        of_head = features // turn * of_features + of_tokens + features // plan.chunk * schedule.straight
        return rows // plan.lanes * heads * of_head

    moved = rows * heads * features * values * jnp.dtype(dtype).itemsize
    state = rows, heads, features, values
    return Call(taylor_decode.taylor_attention_decode, arguments, moved, state, "taylor_decode", cycles)


def delta(rows: int = 128, heads: int = 16, keys: int = 128, values: int = 128) -> Call:
    """Return a token of the gated delta rule."""
    from pallas_kernels.tpu import matrix_state_step as kernels

    shape = rows, heads, keys, values

    def arguments():
        q, v = (jnp.zeros((rows, heads, dim), jnp.bfloat16) for dim in (keys, values))
        return q, q, v, jnp.zeros((rows, heads, 1)), jnp.zeros((rows, heads)), jnp.zeros(shape)

    def cycles(schedule: schedules.Schedule) -> int:
        assert not schedule.loops
        return rows * heads // (kernels.heads_of_program(shape) or heads) * schedule.straight

    return Call(delta_rule.delta_rule_step, arguments, 8.0 * math.prod(shape), shape, "matrix_state_step", cycles)


CALLS = {
    **{f"Taylor, {dtype}": functools.partial(taylor, dtype) for dtype in taylor_decode.FORMATS},
    "gated delta rule": delta,
}
POINTS = {f"{call} {chip} {impl}": (call, chip, impl) for call in CALLS for chip in SLICES for impl in ("tpu", "xla")}


def row_of(name: str, dump: Path) -> dict[str, Any]:
    """Compile a point and return its row."""
    of, chip, impl = POINTS[name]
    call, device = CALLS[of](), topology.find(SLICES[chip]).devices[0]
    text = compiled_text(functools.partial(call.function, impl=impl), call.arguments, device)
    kernel = schedules.of_kernel(dump, call.kernel) if impl == "tpu" else None
    known = devices.find(device.device_kind)
    assert known is not None and known.hbm_bytes_per_second is not None
    return {
        "point": name,
        "call": of,
        "chip": chip,
        "impl": impl,
        "state": call.state,
        "moved_bytes": call.moved_bytes,
        "hbm_microseconds": call.moved_bytes / known.hbm_bytes_per_second * 1e6,
        "cycles": call.cycles(kernel) // CORES.get(chip, 1) if kernel else cycles_of_xla(text),
        "schedule": kernel,
        "copied": text_of(call.state) in COPIED.findall(text),
        "command": f'python -m experiments.tpu run --only="{name}"',
        "device": device.device_kind,
        "revision": revision(),
    }


def compiled_text(function: Callable, arguments: Callable[[], tuple], device: jax.Device) -> str:
    """Return what a call is compiled to for a device, that may write its last argument."""
    mesh = Mesh(np.asarray([device]), ("data",))
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, jax.P())),
        jax.eval_shape(arguments),
    )
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=len(given) - 1).trace(*given).lower().compile().as_text() or ""


def cycles_of_xla(text: str) -> int:
    """Return what its compiler expects of a program's operations but copies, and of none in a loop."""
    return sum(map(int, CYCLES.findall(text[text.index("\nENTRY ") :])))


def text_of(shape: tuple[int, ...]) -> str:
    """Return a shape as programs write it."""
    return ",".join(map(str, shape))


if __name__ == "__main__":
    print(json.dumps(row_of(sys.argv[1], schedules.dump_into_a_folder())))
