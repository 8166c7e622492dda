"""Generation by other libraries' models of the same sizes, in PyTorch."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from based_jax.bench import rows, torch_generation
from based_jax.bench.generate_size import Effort, Size, check, prompts
from based_jax.bench.peers import Peer


def _llama(size: str) -> Peer:
    return Peer(("torch", "transformers"), ("torch", "transformers"), size, torch_generation.llama)


def _gated_deltanet(size: str) -> Peer:
    packages = "torch", "triton", "transformers", "flash-linear-attention"
    return Peer(("torch", "fla", "transformers"), packages, size, torch_generation.gated_deltanet)


PEERS = {
    "hf:llama_1b": _llama("1b"),
    "hf:llama_360m": _llama("360m"),
    "fla:gated_deltanet_1b": _gated_deltanet("1b"),
    "fla:gated_deltanet_360m": _gated_deltanet("360m"),
}
"""By library, model and size."""


def measure(name: str, sizes: Sequence[Size], effort: Effort) -> Iterator[dict[str, Any]]:
    """Yield a peer's row for each size, of the same fields as ours where they mean the same."""
    check(sizes, effort)
    peer = PEERS[name]
    subject, counts = peer.measure(peer.name), prompts(sizes)
    prefill = functools.cache(lambda length: torch_generation.read(subject, counts[length], length))
    for size in sizes:
        row = size._asdict() | torch_generation.decoded(subject, size, effort)
        row |= prefill(size.context) if effort.prefill else {}
        yield row | rows.facts(*peer.packages)
