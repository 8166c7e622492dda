"""The same shapes through PyTorch: flash-linear-attention's kernels and scaled_dot_product_attention.

Torch and FLA are imported where a peer is measured: nothing else needs them, and most machines lack them. Torch shares
the GPU with JAX here: set XLA_PYTHON_CLIENT_PREALLOCATE=false before JAX starts.
"""

import functools
import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable
from typing import NamedTuple

from based_jax.bench.timing import affordable, sets_past_cache
from based_jax.errors import UserError


def _parallel_based() -> Callable:
    from fla.ops.based import parallel_based

    return parallel_based


def _fused_chunk_based() -> Callable:
    from fla.ops.based import fused_chunk_based

    return fused_chunk_based


def _sdpa() -> Callable:
    import torch.nn.functional as F

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attend


def _simple_gla() -> Callable:
    import torch.nn.functional as F
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v, g: chunk_simple_gla(q, k, v, -F.softplus(g[..., 0].float()))[0]


def _gated_delta_rule() -> Callable:
    import torch.nn.functional as F
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def correct(q, k, v, g, beta):
        g, beta = -F.softplus(g[..., 0].float()), beta[..., 0].sigmoid()
        return chunk_gated_delta_rule(q, F.normalize(k, dim=-1), v, g, beta)[0]

    return correct


def _gla() -> Callable:
    import torch.nn.functional as F
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, g: chunk_gla(q, k, v, -F.softplus(g.float()))[0]


def _kda() -> Callable:
    import torch.nn.functional as F
    from fla.ops.kda import chunk_kda

    def correct(q, k, v, g, beta):
        return chunk_kda(q, F.normalize(k, dim=-1), v, -F.softplus(g.float()), beta[..., 0].sigmoid())[0]

    return correct


def _causal_conv1d() -> Callable:
    import torch
    from fla.modules.causal_conv1d import causal_conv1d

    @functools.cache
    def weights(channels: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(size, device="cuda", requires_grad=True) for size in ((channels, 4), (channels,)))

    def convolve(x):
        y, _ = causal_conv1d(x.flatten(2), *weights(x.shape[2] * x.shape[3]), activation="silu")
        return y.unflatten(2, x.shape[2:])

    return convolve


class Peer(NamedTuple):
    """One function of a library.

    Attributes:
      dims: the widths of its arrays (B, T, H, .): q, k, v and what any decays and rates are made of, or x.
      make: imports the library, and returns the function of these arrays.
    """

    dims: tuple[int, ...]
    make: Callable[[], Callable]


PEERS: dict[str, dict[str, Peer]] = {
    "taylor_attention": {
        "fla_parallel_based": Peer((16, 16, 64), _parallel_based),
        "fla_fused_chunk_based": Peer((16, 16, 64), _fused_chunk_based),
    },
    "attention": {"torch_sdpa": Peer((64, 64, 64), _sdpa)},
    "gated_delta_rule": {"fla_chunk_gated_delta_rule": Peer((64, 64, 64, 1, 1), _gated_delta_rule)},
    "simple_gla": {"fla_chunk_simple_gla": Peer((64, 64, 64, 1), _simple_gla)},
    "delta_rule": {"fla_chunk_kda": Peer((64, 64, 64, 64, 1), _kda)},
    "gated_linear_attention": {"fla_chunk_gla": Peer((64, 64, 64, 64), _gla)},
    "short_conv": {"fla_causal_conv1d": Peer((64,), _causal_conv1d)},
}
"""By name in the benchmark."""


def check() -> None:
    """Raise a UserError where PyTorch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("--peers measures libraries of PyTorch, and torch is not installed.")


def versions() -> dict[str, str]:
    """Return the versions of the peers' libraries."""
    found = {}
    for name in ("torch", "triton", "fla-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def microseconds(peer: Peer, shape: tuple[int, int, int], which: str, repeats: int) -> float:
    """Return the median device time of a peer, by CUDA events around calls that the GPU was made to wait for.

    Slow calls are repeated less (`timing.affordable`).
    """
    import torch

    batch, heads, time = shape
    function = peer.make()
    per_set = 2 * batch * heads * time * sum(peer.dims)
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": which != "forward"}
    count = sets_past_cache(per_set, repeats, torch.cuda.get_device_name())
    sets = [[torch.randn(batch, time, heads, dim, **options) for dim in peer.dims] for _ in range(count)]
    cotangent = torch.randn_like(function(*sets[0]))

    def call(arrays) -> None:
        with torch.set_grad_enabled(which != "forward"):
            out = function(*arrays)
        if which != "forward":
            torch.autograd.grad(out, arrays, cotangent)

    for arrays in sets[:2]:
        call(arrays)
    runs = [functools.partial(call, sets[i % len(sets)]) for i in range(repeats)]
    runs = runs[: affordable(repeats, _timed(runs[0]) / 1e6)]
    return statistics.median(map(_timed, runs))


def _timed(call: Callable[[], None]) -> float:
    """Return the device time of one call in us; the GPU sleeps first, so that the host is never what it waits for."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end)
