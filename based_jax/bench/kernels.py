"""The operations that are measured, the least bytes and products of each, and one row per measurement."""

import dataclasses
import functools
import importlib.metadata
import subprocess
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from based_jax.bench.timing import REPEATS, device_microseconds
from based_jax.errors import UserError
from based_jax.flops import peak_flops
from based_jax.ops.conv import short_conv
from based_jax.ops.softmax import attention, window_attention
from based_jax.ops.taylor import expanded_dim, taylor_attention

FEATURE_DIM = 16
HEAD_DIM = 64
TAPS = 3
CHUNK = 64
"""Tokens of a chunk, for the count of products only."""
L2_BYTES = 50 << 20
SHAPES = (8, 16, 2048), (2, 16, 8192), (1, 16, 32768)
LENGTHS = tuple((max(1, (1 << 14) // 2**n), 16, 2**n) for n in range(10, 17))
BATCHES = tuple((batch, 16, 2048) for batch in (1, 2, 4, 8, 16, 32))
SETS = {"table": SHAPES, "lengths": LENGTHS, "batches": BATCHES}
PASSES = "forward", "forward+backward"

COPY_BYTES_PER_SECOND = {"NVIDIA H100": 2.95e12, "NVIDIA H200": 4.3e12}
"""Measured rate of a large copy, read and written bytes together."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """What is measured: `call(impl)` is a function of arrays (B, T, H, dim), one for each of `dims`.

    `cost(pass)` returns the least bytes and the products (FLOPs) of one token and head. `others` are implementations
    that are measured only where they are named.
    """

    dims: tuple[int, ...]
    impls: tuple[str, ...]
    call: Callable[[str], Callable]
    cost: Callable[[str], tuple[float, float]]
    others: tuple[str, ...] = ()


def _taylor_cost(which: str) -> tuple[float, float]:
    """Count q, k, v, o in bf16 and z in fp32; the state is read and added to once per pass over the sequence."""
    k, v, e, visible = FEATURE_DIM, HEAD_DIM, expanded_dim(FEATURE_DIM), (CHUNK + 1) / 2
    forward = 2 * (2 * k + 2 * v) + 4, 4 * e * v + 2 * visible * (k + v)
    if which == "forward":
        return forward
    read, written = 2 * (2 * k + 3 * v) + 4, 2 * (2 * k + v)
    return forward[0] + read + written, forward[1] + 10 * e * v + 2 * visible * (4 * k + 3 * v)


def _softmax_cost(which: str, visible: float | None) -> tuple[float, float]:
    """Count q, k, v, o in bf16 and the log-sums in fp32; products only where the number of visible keys is fixed."""
    forward = 8 * HEAD_DIM + 4, 4 * HEAD_DIM * (visible or 0)
    if which == "forward":
        return forward
    return forward[0] + 10 * HEAD_DIM + 4 + 6 * HEAD_DIM, 3.5 * forward[1]


def _elementwise_cost(which: str, forward: int, backward: int) -> tuple[float, float]:
    return 2 * HEAD_DIM * (forward + (backward if which != "forward" else 0)), 0.0


def _gated_conv(x, gate, kernel):
    """Return silu(conv(x)) * gate over channels of all heads."""
    wide = [y.reshape(*y.shape[:2], -1) for y in (x, gate)]
    return jax.nn.silu(short_conv(wide[0], kernel)) * wide[1]


def _norm(x, residual):
    """Return x + residual and its RMS norm over the channels of all heads."""
    total = (x + residual).reshape(*x.shape[:2], -1)
    wide = total.astype(jnp.float32)
    return total, (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype)


def _conv_call(impl: str) -> Callable:
    del impl
    return lambda x, gate: _gated_conv(x, gate, jnp.ones((TAPS, x.shape[2] * x.shape[3]), x.dtype))


def _window(window: int) -> Operation:
    call = functools.partial(functools.partial, window_attention, window=window)
    cost = functools.partial(_softmax_cost, visible=window)
    return Operation((HEAD_DIM,) * 3, ("cudnn", "xla"), lambda impl: call(impl=impl), cost)


OPERATIONS = {
    "taylor_attention": Operation(
        (FEATURE_DIM, FEATURE_DIM, HEAD_DIM),
        ("hopper", "xla"),
        lambda impl: functools.partial(taylor_attention, impl=impl),
        _taylor_cost,
        others=("oracle",),
    ),
    "attention": Operation(
        (HEAD_DIM,) * 3,
        ("cudnn",),
        lambda impl: functools.partial(attention, impl=impl),
        functools.partial(_softmax_cost, visible=None),
    ),
    "window_attention_64": _window(64),
    "window_attention_128": _window(128),
    "gated_conv": Operation(
        (HEAD_DIM,) * 2, ("xla",), _conv_call, functools.partial(_elementwise_cost, forward=3, backward=5)
    ),
    "residual_rms_norm": Operation(
        (HEAD_DIM,) * 2,
        ("xla",),
        lambda impl: _norm,
        functools.partial(_elementwise_cost, forward=4, backward=4),
    ),
}


def measure(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int, int]],
    *,
    impls: Sequence[str] | None = None,
    peers: bool = False,
    repeats: int = REPEATS,
) -> Iterator[dict]:
    """Yield a row for every operation, shape (B, H, T), implementation and pass, as soon as it is measured.

    `impls` limits implementations and peers to those named. What cannot run yields a row with `error` and no times.

    Raises:
      UserError: there is no GPU.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"'bench' measures GPU kernels, and the device here is {device.device_kind}.")
    facts = device_facts(device.device_kind)

    def wanted(impl: str) -> bool:
        return not impls or impl in impls

    for name in names:
        operation = OPERATIONS[name]
        for shape in shapes:
            for impl in filter(wanted, operation.impls + (operation.others if impls else ())):
                for which in PASSES:
                    timed = functools.partial(_ours, operation, impl, shape, which, repeats)
                    yield _row(name, impl, shape, which, operation, timed, device.device_kind) | facts
            if peers:
                from based_jax.bench import torch_peers

                for peer, dims in torch_peers.PEERS.get(name, {}).items():
                    if not wanted(peer):
                        continue
                    for which in PASSES:
                        timed = functools.partial(torch_peers.microseconds, peer, dims, shape, which, repeats)
                        row = _row(name, peer, shape, which, operation, timed, device.device_kind)
                        yield row | facts | {"versions": facts["versions"] | torch_peers.versions()}


def _row(name, impl, shape, which, operation, timed, kind) -> dict:
    batch, heads, time = shape
    row = {"op": name, "impl": impl, "pass": which, "batch": batch, "heads": heads, "seq_len": time}
    size, flops = (x * batch * heads * time for x in operation.cost(which))
    try:
        microseconds = timed()
    except Exception as error:  # a peer may fail in any way, and the others are still worth measuring
        return row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    floor = floor_microseconds(size, flops, kind)
    return row | {
        "microseconds": round(microseconds, 2),
        "floor_microseconds": floor and round(floor, 2),
        "ratio_to_floor": floor and round(microseconds / floor, 2),
        "terabytes_per_second": round(size / microseconds / 1e6, 3),
        "teraflops": round(flops / microseconds / 1e6, 1) if flops else None,
    }


def floor_microseconds(size: float, flops: float, device_kind: str) -> float | None:
    """Return the larger of the time to move `size` bytes and to do `flops`; None for a device of unknown speed."""
    rate = next((x for name, x in COPY_BYTES_PER_SECOND.items() if device_kind.startswith(name)), None)
    peak = peak_flops(device_kind)
    return 1e6 * max(size / rate, flops / peak) if rate and peak else None


def _ours(operation: Operation, impl: str, shape, which: str, repeats: int) -> float:
    batch, heads, time = shape
    call = operation.call(impl)
    per_set = 2 * batch * heads * time * sum(operation.dims)
    keys = jax.random.split(jax.random.key(0), 2 + 2 * L2_BYTES // per_set)
    inputs = [
        tuple(
            jax.random.normal(jax.random.fold_in(key, i), (batch, time, heads, dim), jnp.bfloat16)
            for i, dim in enumerate(operation.dims)
        )
        for key in keys
    ]
    if which == "forward":
        return device_microseconds(jax.jit(call), inputs, repeats)

    def both(cotangents, *arrays):
        out, pull = jax.vjp(call, *arrays)
        return out, pull(cotangents)

    shapes = jax.eval_shape(call, *inputs[0])
    cotangents = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype), shapes)
    return device_microseconds(jax.jit(both), [(cotangents, *arrays) for arrays in inputs], repeats)


def device_facts(kind: str) -> dict:
    """Return what every row names: device, driver's clocks and versions."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader,nounits"]
    try:
        clocks = [int(x) for x in subprocess.check_output(query, text=True).splitlines()[0].split(",")]
    except (OSError, subprocess.CalledProcessError, ValueError):
        clocks = []
    return {
        "device": kind,
        "clocks_mhz": dict(zip(("sm", "sm_max", "memory"), clocks, strict=False)),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    }
