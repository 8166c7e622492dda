"""Whole models of other libraries, trained on the same shapes: jax-linear-attention's presets and FLA's in PyTorch."""

from typing import Any

from based_jax.bench import fla_models, jla_presets, rows
from based_jax.bench.peers import Peer
from based_jax.bench.train_size import Size

ROWS, SEQ_LEN = 8, 2048


def _jla(name: str) -> Peer:
    return Peer(("jla", "equinox"), ("jax-linear-attention", "equinox"), name, jla_presets.measure)


def _fla(name: str) -> Peer:
    return Peer(
        ("torch", "fla", "transformers"), ("torch", "triton", "flash-linear-attention"), name, fla_models.measure
    )


PEERS = {
    "jla:transformer-1p3b": _jla("transformer-1p3b"),
    "jla:gdn-hd128-1p3b": _jla("gdn-hd128-1p3b"),
    "jla:gdn-1p3b": _jla("gdn-1p3b"),
    "jla:kda-1p3b": _jla("kda-1p3b"),
    "jla:mamba2-1p3b": _jla("mamba2-1p3b"),
    "jla:rwkv7-1p3b": _jla("rwkv7-1p3b"),
    "fla:transformer": _fla("transformer"),
    "fla:gated_deltanet": _fla("gated_deltanet"),
    "fla:kda": _fla("kda"),
    "fla:mamba2": _fla("mamba2"),
    "fla:rwkv7": _fla("rwkv7"),
}
"""By library and model."""


def measure(name: str, size: Size) -> dict[str, Any]:
    """Return the row of a peer: sizes, median time of a step, tokens/s, memory, seconds to compile."""
    peer = PEERS[name]
    found = peer.measure(peer.name, size)
    tokens = size.rows * size.seq_len
    seconds = found["milliseconds"] / 1e3
    sizes = {"rows": size.rows, "seq_len": size.seq_len, "steps": size.steps}
    return sizes | found | {"tokens_per_second": tokens / seconds} | rows.facts(*peer.packages)


def line(row: dict[str, Any]) -> str:
    """Return a row in one line of print."""
    used = f", MFU {row['mfu']:.3f}" if row.get("mfu") else ""
    speed = f"{row['milliseconds']:.2f} ms a step, {row['tokens_per_second']:.0f} tokens/s{used}"
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
    return f"({row['rows']},{row['seq_len']}) on {row['device']}: {speed}; {peak} at most"
