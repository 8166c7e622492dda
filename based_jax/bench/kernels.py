"""One row per measurement: an operation, a shape, an implementation and a pass, beside its floor and its peers."""

import functools
import importlib.metadata
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import jax

from based_jax.bench import torch_peers
from based_jax.bench.operations import OPERATIONS, PASSES, Operation, Shape, program, takes
from based_jax.bench.timing import REPEATS, device_microseconds
from based_jax.errors import UserError, unknown
from based_jax.ops.dispatch import backend_of, named

L2_BYTES = 50 << 20
COMPILERS = 6
"""Programs that are compiled at the same time, none of them while something is timed."""
TOKENS = 1 << 14
"""Of a batch in the sets; times 16 heads."""

SHAPES = (8, 16, 2048), (2, 16, 8192), (1, 16, 32768)
LENGTHS = tuple((max(1, TOKENS // 2**n), 16, 2**n) for n in range(10, 17))
BATCHES = tuple((batch, 16, 2048) for batch in (1, 2, 4, 8, 16, 32))
SHORT = tuple((TOKENS // 2**n, 16, 2**n) for n in range(6, 11))
SETS = {"table": SHAPES, "lengths": LENGTHS, "batches": BATCHES, "short": SHORT}


def measure(
    names: Sequence[str],
    shapes: Sequence[Shape],
    *,
    impls: Sequence[str] = (),
    peers: bool = False,
    repeats: int = REPEATS,
) -> Iterator[dict]:
    """Yield a row for every operation, shape (B, H, T), implementation and pass, as soon as it is measured.

    `impls` limits implementations and peers to those named. What cannot run yields a row with `error` and no times.

    Raises:
      UserError: there is no GPU, or no operation has an implementation or peer of that name.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"'bench' measures GPU kernels, and the device here is {device.device_kind}.")
    known = {x for name in names for x in (*OPERATIONS[name].named, *torch_peers.PEERS.get(name, {}))}
    known |= {backend_of(x) for name in names for x in OPERATIONS[name].table}
    for impl in impls:
        if impl not in known:
            raise unknown("implementation", impl, known)
    facts = device_facts(device.device_kind)
    for name in names:
        for shape in dict.fromkeys(shapes):
            for row in _ours(name, shape, impls, repeats, device.device_kind):
                yield row | facts
            if peers:
                for row in _theirs(name, shape, impls, repeats, device.device_kind):
                    yield row | facts | {"versions": facts["versions"] | torch_peers.versions()}


def _ours(name: str, shape: Shape, impls: Sequence[str], repeats: int, kind: str) -> Iterator[dict]:
    operation = OPERATIONS[name]
    given = {named(operation.table, impl) for impl in impls}
    chosen = [x for x in operation.named if x in given] if impls else operation.usual
    wanted = [(impl, which) for impl in chosen for which in PASSES]
    with futures.ThreadPoolExecutor(COMPILERS) as pool:
        programs = [pool.submit(compiled, operation, *pair, shape) for pair in wanted]
    sets = inputs(operation, shape, repeats) if wanted else []
    for (impl, which), ready in zip(wanted, programs, strict=True):
        yield _row(name, impl, shape, which, functools.partial(_timed, ready, sets, which, repeats), kind)


def _timed(ready: futures.Future, sets: Sequence[tuple], which: str, repeats: int) -> float:
    return device_microseconds(ready.result(), [x[which == "forward" :] for x in sets], repeats)


def _theirs(name: str, shape: Shape, impls: Sequence[str], repeats: int, kind: str) -> Iterator[dict]:
    for peer, dims in torch_peers.PEERS.get(name, {}).items():
        if impls and peer not in impls:
            continue
        for which in PASSES:
            timed = functools.partial(torch_peers.microseconds, peer, dims, shape, which, repeats)
            yield _row(name, peer, shape, which, timed, kind)


def compiled(operation: Operation, impl: str, which: str, shape: Shape) -> Callable:
    """Return a pass compiled for the first device."""
    return jax.jit(program(operation, impl, which)).lower(*takes(operation, shape, which)).compile()


def inputs(operation: Operation, shape: Shape, repeats: int = REPEATS) -> list[tuple]:
    """Return sets of random (gradients of the results, *arrays), more than the L2 cache holds; gradients are shared."""
    gradients, *arrays = takes(operation, shape, "forward+backward")
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    count = min(max(repeats, 2), 2 + 2 * L2_BYTES // size)
    draw = jax.jit(lambda key: _normal(key, arrays))
    shared = _normal(jax.random.key(1), gradients)
    return [(shared, *draw(key)) for key in jax.random.split(jax.random.key(0), count)]


def _normal(key: jax.Array, shapes):
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def _row(name: str, impl: str, shape: Shape, which: str, timed: Callable[[], float], kind: str) -> dict:
    batch, heads, time = shape
    row = {"op": name, "impl": impl, "pass": which, "batch": batch, "heads": heads, "seq_len": time}
    size, flops = (x * batch * heads * time for x in OPERATIONS[name].cost(which))
    floor = floor_microseconds(size, flops, kind)
    row["floor_microseconds"] = floor and round(floor, 2)
    try:
        microseconds = timed()
    except Exception as error:  # a peer may fail in any way, and the others are still worth measuring
        return row | {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    return row | {
        "microseconds": round(microseconds, 2),
        "ratio_to_floor": floor and round(microseconds / floor, 2),
        "terabytes_per_second": round(size / microseconds / 1e6, 3),
        "teraflops": round(flops / microseconds / 1e6, 1) if flops else None,
    }


def floor_microseconds(size: float, flops: float, device_kind: str) -> float | None:
    """Return the larger of the time to move `size` bytes and to do `flops`; None for a device of unknown speed."""
    device = devices.find(device_kind)
    rate, peak = (device.copy_bytes_per_second, device.peak_bf16_flops) if device else (None, None)
    return 1e6 * max(size / rate, flops / peak) if rate and peak else None


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
