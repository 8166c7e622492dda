"""One row per measurement: an operation, a shape, an implementation and a pass, beside its floor and its peers."""

import functools
import itertools
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax

from based_jax import devices
from based_jax.bench import rows, torch_peers
from based_jax.bench.cases import arrays_of, results_of
from based_jax.bench.catalogue import OPERATIONS, TimedShape, timed_case, timed_operation
from based_jax.bench.catalogue.operation import FORWARD, Arrays, Case
from based_jax.bench.defaults import REPEATS
from based_jax.bench.timing import device_microseconds, sets_past_cache
from based_jax.errors import UserError, unknown
from based_jax.ops.dispatch import backend_of

TIMED_COMPILE_THREADS = 6
"""Programs that are compiled at the same time, none of them while something is timed."""
BATCH_TOKENS = 1 << 14
"""In the sets; times 16 heads."""

TABLE_SHAPES = (8, 16, 2048), (2, 16, 8192), (1, 16, 32768)
LENGTH_SHAPES = tuple((max(1, BATCH_TOKENS // 2**n), 16, 2**n) for n in range(10, 17))
BATCH_SHAPES = tuple((batch, 16, 2048) for batch in (1, 2, 4, 8, 16, 32))
SHORT_SHAPES = tuple((BATCH_TOKENS // 2**n, 16, 2**n) for n in range(6, 11))
SHAPE_SETS = {"table": TABLE_SHAPES, "lengths": LENGTH_SHAPES, "batches": BATCH_SHAPES, "short": SHORT_SHAPES}


def measure(
    names: Sequence[str],
    shapes: Sequence[TimedShape],
    *,
    impls: Sequence[str] = (),
    peers: bool = False,
    repeats: int = REPEATS,
) -> Iterator[dict]:
    """Yield a row for every operation, shape, implementation and pass, as soon as it is measured.

    A shape is (B, H, T), or with dims of its own (B, H, T, K, V).

    `impls` limits implementations and peers to those named. What cannot run yields a row with `error` and no times.

    Raises:
      UserError: there is no GPU, no operation has an implementation or peer of that name, or the dims are impossible.
    """
    for name, shape in itertools.product(names, shapes):
        timed_case(name, shape, "auto")
    if peers and any(len(shape) > 3 for shape in shapes):
        raise UserError("Peers are timed at BxHxT, with the usual dims: leave out --peers, or the dims.")
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"'bench' measures GPU kernels, and the device here is {device.device_kind}.")
    tables = [timed_operation(name).table for name in names]
    known = {x for table in tables for key in table for x in (key, backend_of(key))}
    known |= {peer for name in names for peer in torch_peers.PEERS.get(name, {})}
    for impl in impls:
        if impl not in known:
            raise unknown("implementation", impl, known)
    facts = {"clocks_mhz": clocks_mhz()} | rows.facts()
    for name in names:
        for shape in dict.fromkeys(shapes):
            for row in _ours(name, shape, impls, repeats, device.device_kind):
                yield row | facts
            if peers:
                for row in _theirs(name, shape, impls, repeats, device.device_kind):
                    yield row | facts | {"versions": facts["versions"] | torch_peers.versions()}


def _ours(name: str, shape: TimedShape, impls: Sequence[str], repeats: int, kind: str) -> Iterator[dict]:
    operation = timed_operation(name)
    chosen = operation.impls(impls) if impls else operation.usual_impls
    wanted = [(timed_case(name, shape, impl), which) for impl in chosen for which in operation.passes]
    with futures.ThreadPoolExecutor(TIMED_COMPILE_THREADS) as pool:
        programs = [pool.submit(compiled, *pair) for pair in wanted]
    sets = inputs(wanted[0][0], repeats) if wanted else []
    for (case, which), ready in zip(wanted, programs, strict=True):
        yield _row(name, case.impl, shape, which, functools.partial(_timed, ready, sets, which, repeats), kind)


def _timed(ready: futures.Future, sets: Sequence[tuple], which: str, repeats: int) -> float:
    return device_microseconds(ready.result(), [given(x, which) for x in sets], repeats)


def _theirs(name: str, shape: TimedShape, impls: Sequence[str], repeats: int, kind: str) -> Iterator[dict]:
    batch, heads, time = shape
    for impl, peer in torch_peers.PEERS.get(name, {}).items():
        if impls and impl not in impls:
            continue
        for which in timed_operation(name).passes:
            timed = functools.partial(torch_peers.microseconds, peer, (batch, heads, time), which, repeats)
            yield _row(name, impl, shape, which, timed, kind)


def program(case: Case, which: str) -> Callable:
    """Return a function of the arrays, or of the results' gradients and the arrays, that runs a pass."""
    operation, names = OPERATIONS[case.operation], results_of(case)
    function = (operation.timed_function or operation.function)(case)

    def forward(arrays: Arrays) -> Arrays:
        found = function(arrays, None)
        return {name: found[name] for name in names}

    def both(gradients: Arrays, arrays: Arrays) -> tuple[Arrays, Arrays]:
        out, pull = jax.vjp(forward, arrays)
        [found] = pull(gradients)
        return out, found

    return forward if which == FORWARD else both


def given(inputs: tuple[Any, Any], which: str) -> tuple:
    """Return what a pass takes of (gradients of the results, arrays)."""
    return inputs[which == FORWARD :]


def compiled(case: Case, which: str) -> "jax.stages.Compiled | InPlace":
    """Return a pass compiled for the first device."""
    run, updates = program(case, which), OPERATIONS[case.operation].updates
    if updates and which == FORWARD:
        return InPlace(run, arrays_of(case), updates)
    return jax.jit(run).lower(*given((results_of(case), arrays_of(case)), which)).compile()


class InPlace:
    """A compiled forward pass that writes arrays where they lie, and leaves what they become in their place.

    Were they kept they would be copied first, which takes as long as the pass.
    """

    def __init__(self, run: Callable, arrays: Mapping[str, Any], updates: Mapping[str, str]):
        self._updates = updates
        donating = jax.jit(lambda written, kept: run(written | kept), donate_argnums=0)
        self._compiled = donating.lower(*self._parts(arrays)).compile()

    def __call__(self, arrays: Arrays) -> Arrays:
        """Return the results."""
        found = self._compiled(*self._parts(arrays))
        arrays.update({name: found[result] for name, result in self._updates.items()})
        return found

    def as_text(self) -> str | None:
        """Return the program's text, as `jax.stages.Compiled` does."""
        return self._compiled.as_text()

    def _parts(self, arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        written = {name: arrays[name] for name in self._updates}
        return written, {name: x for name, x in arrays.items() if name not in written}


def inputs(case: Case, repeats: int = REPEATS) -> list[tuple[Arrays, Arrays]]:
    """Return sets of random (gradients of the results, arrays), more than the L2 cache holds; gradients are shared."""
    arrays, scales = arrays_of(case), OPERATIONS[case.operation].scales
    size = sum(x.size * x.dtype.itemsize for x in arrays.values())
    count = sets_past_cache(size, repeats, jax.devices()[0].device_kind)
    draw = jax.jit(lambda key: _normal(key, arrays, scales))
    shared = _normal(jax.random.key(1), results_of(case), {})
    return [(shared, draw(key)) for key in jax.random.split(jax.random.key(0), count)]


def _normal(key: jax.Array, shapes: Mapping[str, jax.ShapeDtypeStruct], scales: Mapping[str, float]) -> Arrays:
    keys = jax.random.split(key, len(shapes))
    drawn = {name: jax.random.normal(k, x.shape, x.dtype) for k, (name, x) in zip(keys, shapes.items(), strict=True)}
    return {name: x * scales[name] if name in scales else x for name, x in drawn.items()}


def place(name: str, impl: str, shape: TimedShape, which: str) -> dict:
    """Return what says which call a row is of."""
    batch, heads, time, *dims = shape
    row = {"op": name, "impl": impl, "pass": which, "batch": batch, "heads": heads, "seq_len": time}
    return row | ({"dims": dims} if dims else {})


def _row(name: str, impl: str, shape: TimedShape, which: str, timed: Callable[[], float], kind: str) -> dict:
    row, case = place(name, impl, shape, which), timed_case(name, shape, impl)
    size, flops = OPERATIONS[case.operation].cost(case, which)
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


def clocks_mhz() -> dict[str, int]:
    """Return the clocks that the driver tells."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader,nounits"]
    try:
        clocks = [int(x) for x in subprocess.check_output(query, text=True).splitlines()[0].split(",")]
    except (OSError, subprocess.CalledProcessError, ValueError):
        clocks = []
    return dict(zip(("sm", "sm_max", "memory"), clocks, strict=False))
