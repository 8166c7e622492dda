"""Mamba's selective scan, Mamba-2's with one decay a head (SSD), and RWKV-4's average of values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.definitions import scan_tokens
from based_jax.bench.catalogue.operation import (
    BF16,
    FORWARD,
    FP32,
    HEAD_DIM,
    PACKED,
    Arrays,
    Case,
    Function,
    Operation,
    bf16,
    by_channel,
    by_head,
    fp32,
    tokens,
)
from based_jax.ops import selective_scan, ssd, wkv4
from based_jax.ops.calls import WkvState

TIMED_STATES, SSD_DIMS = 16, (HEAD_DIM, HEAD_DIM)
"""Of what is timed: states of a channel, and (N, P)."""


def steps_and_rates(dt, A):
    """Return steps above 0 and rates below it, of arrays of any sign: softplus(dt - 2) and -exp(A)."""
    return jax.nn.softplus(dt - 2), -jnp.exp(A)


def _scan_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    (batch, channels, time), [states] = case.shape, case.dims
    narrow = {"u": (batch, time, channels), "B": (batch, time, states), "C": (batch, time, states)}
    wide = {"dt": (batch, time, channels), "A": (channels, states), "state": (batch, channels, states)}
    return bf16(narrow) | fp32(wide)


def _raw_scan_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    found = _scan_arrays(case)
    return found | bf16({"dt": found["dt"].shape}) | fp32({"bias": (case.shape[1],)})


def _scan(case: Case) -> Function:
    def run(arrays, ids):
        bias = arrays.get("bias")
        dt, A = steps_and_rates(arrays["dt"], arrays["A"])
        options = {"bias": bias, "state": arrays.get("state"), "segment_ids": ids, "impl": case.impl}
        dt = dt if bias is None else arrays["dt"]
        y, state = selective_scan.selective_scan(arrays["u"], dt, A, arrays["B"], arrays["C"], **options)
        return {"y": y, "state": state}

    return run


def scan_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return y_t = C_t . h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, and the last document's h.

    `arrays` are u and dt (B, T, D), A (D, N), B, C (B, T, N) and the first document's `state` before the first token.
    With a `bias` (D) the steps are softplus(dt + bias).
    """
    dt, A = steps_and_rates(arrays["dt"], arrays["A"])
    if "bias" in arrays:
        dt = jax.nn.softplus(arrays["dt"] + arrays["bias"][None, None])

    def token(h, u, dt, B, C):
        h = jnp.exp(dt[..., None] * A[None]) * h + (dt * u)[..., None] * B[:, None]
        return h, jnp.einsum("bdn,bn->bd", h, C)

    y, state = scan_tokens(token, arrays["state"], (arrays["u"], dt, arrays["B"], arrays["C"]), ids)
    return {"y": y, "state": state}


def _scan_cost(case: Case, which: str, step_bytes: int = FP32) -> tuple[float, float]:
    """Count u and y in bf16, the steps, B and C in bf16; a state decays, is added to and read, in each channel."""
    (batch, _, time), [states] = case.shape, case.dims
    narrow = 2 * BF16 * states * batch * time
    size, flops = tokens(case) * (2 * BF16 + step_bytes) + narrow, 6.0 * tokens(case) * states
    if which == FORWARD:
        return size, flops
    # u, dt, B, C and y's gradient are read, the four's own written.
    return size + tokens(case) * (3 * BF16 + 2 * step_bytes) + 2 * narrow, 3 * flops


def _scan_cases(name: str) -> tuple[Case, ...]:
    make = functools.partial(Case, name)
    return (
        *(make((2, 128, time), (16,), **x) for time in (1, 15, 65) for x in ({}, PACKED)),
        *(make((3, 256, 130), (states,), **PACKED) for states in (8, 24, 32)),
        make((32, 256, 256), (16,), quick=True),
        make((2, 512, 2049), (16,), **PACKED, quick=True),
        *(make((4, 128, 130), (16,), documents=True, through=x) for x in ("vmap", "shard_map")),
    )


def _ssd_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    (batch, heads, time), (states, width) = case.shape, case.dims
    narrow = {"x": (batch, time, heads, width), "B": (batch, time, 1, states), "C": (batch, time, 1, states)}
    wide = {"dt": (batch, time, heads), "A": (heads,), "state": (batch, heads, states, width)}
    return bf16(narrow) | fp32(wide)


def _ssd(case: Case) -> Function:
    def run(arrays, ids):
        dt, A = steps_and_rates(arrays["dt"], arrays["A"])
        options = {"state": arrays.get("state"), "segment_ids": ids, "impl": case.impl}
        y, state = ssd.ssd(arrays["x"], dt, A, arrays["B"], arrays["C"], **options)
        return {"y": y, "state": state}

    return run


def ssd_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return y_t = C_t^T S_t with S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T, and the last document's S.

    `arrays` are x (B, T, H, P), dt (B, T, H), A (H,), B, C (B, T, 1, N) and the first document's `state` (B, H, N, P).
    """
    dt, A = steps_and_rates(arrays["dt"], arrays["A"])

    def token(S, x, dt, B, C):
        written = jnp.einsum("bn,bhp->bhnp", B[:, 0], dt[..., None] * x)
        S = jnp.exp(dt * A[None])[..., None, None] * S + written
        return S, jnp.einsum("bn,bhnp->bhp", C[:, 0], S)

    y, state = scan_tokens(token, arrays["state"], (arrays["x"], dt, arrays["B"], arrays["C"]), ids)
    return {"y": y, "state": state}


def _ssd_cost(case: Case, which: str) -> tuple[float, float]:
    """Count x and y in bf16, a step in fp32, B and C in bf16 once for all heads; a state is added to and read."""
    (batch, _, time), (states, width) = case.shape, case.dims
    narrow = 2 * BF16 * states * batch * time
    size, flops = tokens(case) * (2 * BF16 * width + FP32) + narrow, 4.0 * tokens(case) * states * width
    if which == FORWARD:
        return size, flops
    return size + tokens(case) * (3 * BF16 * width + 2 * FP32) + 2 * narrow, 3 * flops


def _ssd_cases() -> tuple[Case, ...]:
    make = functools.partial(Case, "ssd")
    return (
        # One token's gradient of B is C times one number, the sum of its heads' dt x . dy, in which dt x, the sum and
        # the parts of programs are rounded to bf16: off by 3.4e-3 as a rule, and of 8 rows by over 5e-3 in 7 of 100.
        *(make((64, 16, 1), (16, 64), **x) for x in ({}, PACKED)),
        # A's gradient has an element a head, each a sum that may cancel, and products of bf16 give that to no 5e-3.
        *(make((8, 16, 65), (16, 64), **x) for x in ({}, PACKED)),
        make((16, 2, 130), (64, 64), **PACKED),
        make((64, 2, 256), (64, 64), quick=True),
        *(make((8, 16, 130), (16, 64), documents=True, through=x) for x in ("vmap", "shard_map")),
    )


def _wkv4_arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    batch, channels, time = case.shape
    narrow = dict.fromkeys(("k", "v"), (batch, time, channels))
    return bf16(narrow) | fp32({"decay": (channels,), "bonus": (channels,), "state": (batch, 3, channels)})


def _wkv4(case: Case) -> Function:
    """Return the average and the sums that the last state stands for, as the definition has them."""

    def run(arrays, ids):
        state = arrays.get("state")
        if state is not None:
            state = WkvState(state[:, 0], state[:, 1] ** 2, state[:, 2])
        options = {"state": state, "segment_ids": ids, "impl": case.impl}
        y, (num, den, top) = wkv4.wkv4(arrays["k"], arrays["v"], -jnp.exp(arrays["decay"]), arrays["bonus"], **options)
        return {"y": y, "state": jnp.stack([num, den], axis=1) * jnp.exp(top)[:, None]}

    return run


def wkv4_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return y_t = (N + e^(u + k_t) v_t) / (D + e^(u + k_t)) and the last document's sums N and D.

    Their first token's are e^m n and e^m d^2 of the `state` (n, d, m) (B, 3, D). After a token both have decayed by
    e^-exp(decay), and have e^k_t v_t and e^k_t more.
    """
    kept, own = (jnp.exp(x)[None] for x in (-jnp.exp(arrays["decay"]), arrays["bonus"]))
    num, den, top = (arrays["state"][:, i] for i in range(3))

    def token(sums, k, v):
        written = jnp.stack([jnp.exp(k) * v, jnp.exp(k)], axis=1)
        read = sums + own[:, None] * written
        return kept[:, None] * sums + written, read[:, 0] / read[:, 1]

    start = jnp.stack([num, den**2], axis=1) * jnp.exp(top)[:, None]
    y, state = scan_tokens(token, start, (arrays["k"], arrays["v"]), ids)
    return {"y": y, "state": state}


def _wkv4_cost(case: Case, which: str) -> tuple[float, float]:
    """Count k, v and y in bf16; a sum decays, is added to and read, with an exponential each time, for two sums."""
    size, flops = tokens(case) * 3 * BF16, 14.0 * tokens(case)
    # k, v and y's gradient are read, the two's own written.
    return (size, flops) if which == FORWARD else (size + tokens(case) * 5 * BF16, 3 * flops)


def _wkv4_cases() -> tuple[Case, ...]:
    make = functools.partial(Case, "wkv4")
    return (
        *(make((2, 128, time), **x) for time in (1, 15, 65) for x in ({}, PACKED)),
        make((3, 200, 130), **PACKED),
        make((32, 256, 256), quick=True),
        make((2, 512, 2049), **PACKED, quick=True),
        *(make((4, 128, 130), documents=True, through=x) for x in ("vmap", "shard_map")),
    )


def _scan_operation(name: str, **differences: Any) -> Operation:
    return Operation(
        table=selective_scan.IMPLEMENTATIONS,
        function=_scan,
        oracle=lambda case: scan_definition,
        kernels={"hopper_steps": ("selective_scan",)},
        cases=_scan_cases(name),
        small_cases=(Case(name, (1, 128, 50), (TIMED_STATES,), **PACKED),),
        timed={name: by_channel(name, (TIMED_STATES,))},
        compile_seconds=5.0,
        **differences,
    )


SELECTIVE_SCAN = _scan_operation("selective_scan", arrays=_scan_arrays, cost=_scan_cost, weights=frozenset({"A"}))
RAW_SELECTIVE_SCAN = _scan_operation(
    "raw_selective_scan",
    arrays=_raw_scan_arrays,
    cost=functools.partial(_scan_cost, step_bytes=BF16),
    weights=frozenset({"A", "bias"}),
)

SSD = Operation(
    table=ssd.IMPLEMENTATIONS,
    arrays=_ssd_arrays,
    function=_ssd,
    oracle=lambda case: ssd_definition,
    cost=_ssd_cost,
    kernels={"triton_chunks": ("one_decay_", "shared_keys_"), "hopper_steps": ("selective_scan",)},
    cases=_ssd_cases(),
    small_cases=(Case("ssd", (1, 2, 50), (16, 64), **PACKED),),
    timed={"ssd": by_head("ssd", SSD_DIMS)},
    weights=frozenset({"A"}),
    compile_seconds=5.0,
)

WKV4 = Operation(
    table=wkv4.IMPLEMENTATIONS,
    arrays=_wkv4_arrays,
    function=_wkv4,
    oracle=lambda case: wkv4_definition,
    cost=_wkv4_cost,
    kernels={"hopper_steps": ("wkv4_",)},
    cases=_wkv4_cases(),
    small_cases=(Case("wkv4", (1, 128, 50), **PACKED),),
    timed={"wkv4": by_channel("wkv4")},
    weights=frozenset({"decay", "bonus"}),
    compile_seconds=5.0,
)
