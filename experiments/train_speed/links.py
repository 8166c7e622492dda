"""How fast GPUs of one host exchange: each kind of collective by bytes, which estimates take at the vendor's rates.

python -m experiments.train_speed.links    on all GPUs that are there; rows are appended to results/links.jsonl

Times are of calls that wait in line, the host's part of each included: 0.1 ms and more.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import pandas as pd
from jax import lax

from based_jax.bench import rows
from based_jax.pictures.tables import markdown

ROWS = Path(__file__).parent / "results" / "links.jsonl"
MIBS = (1, 8, 32, 128, 512)
CALLS = 20
AXIS = "devices"


def _next(x: jax.Array) -> jax.Array:
    count = lax.axis_size(AXIS)
    return lax.ppermute(x, AXIS, [(i, (i + 1) % count) for i in range(count)])


KINDS: dict[str, tuple[Callable[[jax.Array], jax.Array], Callable[[int], float]]] = {
    "all-gather": (functools.partial(lax.all_gather, axis_name=AXIS, tiled=True), lambda n: n - 1),
    "reduce-scatter": (functools.partial(lax.psum_scatter, axis_name=AXIS, tiled=True), lambda n: (n - 1) / n),
    "all-reduce": (functools.partial(lax.psum, axis_name=AXIS), lambda n: 2 * (n - 1) / n),
    "collective-permute": (_next, lambda n: 1.0),
}
"""A kind's call of what a device has, and how much of it a device sends at the least."""


def measured() -> Iterator[dict]:
    """Yield a row for each kind and size."""
    mesh, devices = jax.make_mesh((jax.device_count(),), (AXIS,)), jax.device_count()
    for mib in MIBS:
        for kind, (call, sent) in KINDS.items():
            seconds = _seconds(mesh, call, mib << 20)
            yield {
                "kind": kind,
                "mib": mib,
                "devices": devices,
                "microseconds": round(1e6 * seconds, 1),
                "sent_bytes_per_second": sent(devices) * (mib << 20) / seconds,
                **rows.facts(),
            }


def _seconds(mesh: jax.sharding.Mesh, call: Callable[[jax.Array], jax.Array], count: int) -> float:
    """Return the mean time of a call of bf16 arrays, of which each device has so many bytes."""
    over = jax.P(AXIS)
    x = jax.device_put(jnp.ones(mesh.size * count // 2, jnp.bfloat16), jax.NamedSharding(mesh, over))
    run = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=over, out_specs=over, check_vma=False))
    jax.block_until_ready(run(x))
    begin = time.perf_counter()
    for _ in range(CALLS):
        y = run(x)
    jax.block_until_ready(y)
    return (time.perf_counter() - begin) / CALLS


def table(found: Sequence[dict]) -> str:
    """Return the table of the rates by kind and size, of the last row of each."""
    last = {(row["kind"], row["mib"]): row for row in found}
    if not last:
        return "None has been measured."
    devices = dict.fromkeys(f"{row['devices']} x {row['device']}" for row in last.values())
    cells = [
        {f"GB/s sent by each of {' and '.join(devices)}": f"`{kind}`"}
        | {f"{mib} MiB": _told(last.get((kind, mib))) for mib in MIBS}
        for kind in dict.fromkeys(kind for kind, _ in last)
    ]
    return markdown(pd.DataFrame(cells))


def _told(row: dict | None) -> str:
    return "" if row is None else f"{row['sent_bytes_per_second'] / 1e9:.0f} ({row['microseconds']:,.0f} us)"


def main() -> int:
    """Measure, print and append."""
    with rows.appended(ROWS) as write:
        for row in measured():
            told = f"{row['microseconds']:.1f} us, {row['sent_bytes_per_second'] / 1e9:.1f} GB/s"
            print(f"{row['kind']} {row['mib']} MiB: {told}", flush=True)
            write(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
