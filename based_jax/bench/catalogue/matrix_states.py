"""States that are matrices: gated linear attention, the delta rules, and the diagonal plus low rank form.

A name says what decays: in `gated_linear_attention`, `delta_rule` (KDA) and `dplr` (RWKV-7) each channel by itself, in
`simple_gla` and `gated_delta_rule` a whole head.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

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
    Definition,
    Function,
    Operation,
    by_head,
    fp32,
    queries_keys_values,
    tokens,
)
from based_jax.ops import delta_rule, gated_linear_attention
from based_jax.ops.dispatch import Implementation

DIMS = HEAD_DIM, HEAD_DIM
MANY_ROWS, FEW_ROWS = (64, 16), (2, 2)
"""Of the short cases (up to 65 tokens), and of the wide ones.

Of few gradients of a short sequence some cancel, and products of bf16 give those to no 5e-3: chunks take many rows, and
so does whatever is given keys times rates in bf16. Token by token kernels are right on few rows elsewhere.
"""
STEP_KERNELS = ("recurrence",)
ONE_DECAY_KERNELS, CHANNEL_DECAY_KERNELS = ("one_decay_",), ("channel_decays_",)
INVERSE_KERNELS = ("inverses",)
"""What the kernels' names begin with: token by token, by chunks, and by chunks that are corrected."""


MOST_KEYS = {("delta_rule", "hopper_chunks"): 128, ("dplr", "hopper_chunks"): 64}
"""How many channels of keys the chunks of an operation take, where that is not all."""
STEEP = {"g": 8.0}
"""By what numbers are larger of which log-decays are made: -16 a token beside channels that hardly decay."""


class Preparation(NamedTuple):
    """What an operation is given, made of numbers of any sign.

    Attributes:
      log_decays: function of g that returns log-decays below 0.
      keys: function of k that returns a delta rule's keys, about as long as 1, in their own dtype.
      rates: function of beta (B, T, H, 1) that returns a delta rule's rates (B, T, H).
    """

    log_decays: Callable[[jax.Array], jax.Array]
    keys: Callable[[jax.Array], jax.Array]
    rates: Callable[[jax.Array], jax.Array]


def _unit_keys(k):
    return k * jax.lax.rsqrt(jnp.sum(k.astype(jnp.float32) ** 2, axis=-1, keepdims=True)).astype(k.dtype)


TIMED = Preparation(lambda g: -jax.nn.softplus(g), _unit_keys, lambda beta: jax.nn.sigmoid(beta)[..., 0])
"""What the peers in `torch_peers` make of the same arrays."""
CHECKED = Preparation(
    lambda g: -jax.nn.softplus(2 * g), lambda k: k / 8, lambda beta: 0.5 * jax.nn.sigmoid(beta)[..., 0]
)
"""Decays that forget sooner, and keys of length 1, about, that no dtype rounds, with rates that stay bounded."""


def read_and_written(direction):
    """Return what a state loses along a direction: a and b of the recurrence."""
    unit = direction * jax.lax.rsqrt(jnp.sum(direction * direction, axis=-1, keepdims=True) + 1)
    return -unit, 0.5 * unit


def _arrays(case: Case, decays: int | None, extra: str | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return q, k, v, numbers that decays are made of, K of them where None, any `extra` like these, and a state."""
    (batch, heads, time), (k, v) = case.shape, case.dims
    widths = {"g": decays or k} | ({extra: {"beta": 1, "direction": k}[extra]} if extra else {})
    shapes = {name: (batch, time, heads, width) for name, width in widths.items()}
    return queries_keys_values(case) | fp32(shapes | {"state": (batch, heads, k, v)})


def _options(arrays, ids, case: Case) -> dict:
    return {"state": arrays.get("state"), "segment_ids": ids, "impl": case.impl}


def _attention(case: Case, prepare: Preparation = CHECKED) -> Function:
    def run(arrays, ids):
        q, k, v, g = (arrays[name] for name in ("q", "k", "v", "g"))
        given = q, k, v, prepare.log_decays(g)
        o, state = gated_linear_attention.gated_linear_attention(*given, **_options(arrays, ids, case))
        return {"o": o, "state": state}

    return run


def _correction(case: Case, prepare: Preparation = CHECKED) -> Function:
    def run(arrays, ids):
        q, k, v, g = (arrays[name] for name in ("q", "k", "v", "g"))
        given = q, prepare.keys(k), v, prepare.log_decays(g), prepare.rates(arrays["beta"])
        o, state = delta_rule.delta_rule(*given, **_options(arrays, ids, case))
        return {"o": o, "state": state}

    return run


def _low_rank(case: Case, prepare: Preparation = CHECKED) -> Function:
    def run(arrays, ids):
        q, k, v, g = (arrays[name] for name in ("q", "k", "v", "g"))
        given = q, k, v, prepare.log_decays(g), *read_and_written(arrays["direction"])
        o, state = delta_rule.dplr(*given, **_options(arrays, ids, case))
        return {"o": o, "state": state}

    return run


def attention_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return o_t = S_t^T q_t / sqrt(K) with S_t = diag(w_t) S_{t-1} + k_t v_t^T, and the last document's S.

    `arrays` are q, k (B, T, H, K), g like them or (B, T, H, 1), v (B, T, H, V) and the first document's `state` before
    the first token.
    """
    nothing = jnp.zeros_like(arrays["k"])
    return _recurrence(arrays, arrays["k"], nothing, nothing, ids)


def correction_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return `low_rank_definition` with a = w k, b = -beta k and beta k for k, of keys of length 1."""
    k = CHECKED.keys(arrays["k"])
    written = CHECKED.rates(arrays["beta"])[..., None] * k
    return _recurrence(arrays, written, jnp.exp(CHECKED.log_decays(arrays["g"])) * k, -written, ids)


def low_rank_definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return o_t = S_t^T q_t / sqrt(K) with S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, and the last S.

    `arrays` are those of `attention_definition` and the `direction` (B, T, H, K) of a and b.
    """
    a, b = read_and_written(arrays["direction"])
    return _recurrence(arrays, arrays["k"], a, b, ids)


def _recurrence(arrays: Arrays, k, a, b, ids) -> Arrays:
    def token(S, q, k, v, w, a, b):
        u = jnp.einsum("bhk,bhkv->bhv", a, S)
        S = w[..., None] * S + b[..., None] * u[..., None, :] + k[..., None] * v[..., None, :]
        return S, jnp.einsum("bhk,bhkv->bhv", q, S) * q.shape[-1] ** -0.5

    w = jnp.exp(jnp.broadcast_to(CHECKED.log_decays(arrays["g"]), k.shape))
    o, state = scan_tokens(token, arrays["state"], (arrays["q"], k, arrays["v"], w, a, b), ids)
    return {"o": o, "state": state}


def _cost(case: Case, which: str, decays: int | None, products: int, low_rank: bool = False) -> tuple[float, float]:
    """Count q, k, v, o in bf16, decays, a and b in fp32; the state is read or added to once a product.

    Rates, one number a head, are not counted.
    """
    (k, v), count = case.dims, tokens(case)
    numbers = FP32 * ((decays or k) + 2 * k * low_rank)
    size, flops = BF16 * 2 * (k + v) + numbers, 2.0 * products * k * v
    if which != FORWARD:
        # q, k, v, o's gradient and the numbers are read, the gradients of all but o written.
        size, flops = size + BF16 * (4 * k + 3 * v) + 2 * numbers, 3 * flops
    return count * size, count * flops


def _cases(name: str, chunks: Sequence[str], steps_rows: tuple[int, int]) -> tuple[Case, ...]:
    make = functools.partial(Case, name)
    widths = (24, 48), (64, 64), (64, 128), (128, 128), (128, 192)
    cases = []
    for impl, (short, wide) in {**dict.fromkeys(chunks, MANY_ROWS), "hopper_steps": steps_rows}.items():
        cases += [make((short, 2, time), (32, 32), impl, **x) for time in (1, 15, 65) for x in ({}, PACKED)]
        widest, most = [(200, 320)] if impl in chunks else [], MOST_KEYS.get((name, impl), 256)
        cases += [make((wide, 3, 130), x, impl, **PACKED) for x in (*widths, *widest) if x[0] <= most]
    return (
        *cases,
        make((64, 2, 256), (64, 64), quick=True),
        make((1, 5, 2049), (64, 64), **PACKED),
        *(make((16, 2, 320), x, values="steep", **PACKED) for x in ((64, 64), (128, 128))),
        *(make((4, 2, 130), (64, 64), documents=True, through=x) for x in ("vmap", "shard_map")),
    )


def _matrix_states(
    name: str,
    table: Mapping[str, Implementation],
    function: Callable[..., Function],
    definition: Definition,
    kernels: Mapping[str, tuple[str, ...]],
    *,
    decays: int | None,
    extra: str | None = None,
    products: int,
    compile_seconds: float,
) -> Operation:
    return Operation(
        table=table,
        arrays=functools.partial(_arrays, decays=decays, extra=extra),
        function=function,
        oracle=lambda case: definition,
        cost=functools.partial(_cost, decays=decays, products=products, low_rank=extra == "direction"),
        kernels=kernels,
        cases=_cases(name, [x for x in kernels if x.endswith("_chunks")], MANY_ROWS if extra == "beta" else FEW_ROWS),
        small_cases=(Case(name, (1, 2, 50), (64, 64), **PACKED),),
        factors={"steep": STEEP},
        timed={name: by_head(name, DIMS)},
        timed_function=functools.partial(function, prepare=TIMED),
        compile_seconds=compile_seconds,
    )


GATED_LINEAR_ATTENTION = _matrix_states(
    "gated_linear_attention",
    gated_linear_attention.IMPLEMENTATIONS,
    _attention,
    attention_definition,
    {"triton_chunks": CHANNEL_DECAY_KERNELS, "hopper_steps": STEP_KERNELS},
    decays=None,
    products=2,
    compile_seconds=7.0,
)

SIMPLE_GLA = _matrix_states(
    "simple_gla",
    gated_linear_attention.IMPLEMENTATIONS,
    _attention,
    attention_definition,
    {"triton_chunks": ONE_DECAY_KERNELS, "hopper_steps": STEP_KERNELS},
    decays=1,
    products=2,
    compile_seconds=4.0,
)

DELTA_RULE = _matrix_states(
    "delta_rule",
    delta_rule.IMPLEMENTATIONS,
    _correction,
    correction_definition,
    {
        "triton_chunks": CHANNEL_DECAY_KERNELS + INVERSE_KERNELS,
        "hopper_steps": STEP_KERNELS,
        "hopper_chunks": ("delta_rule_channels_",),
    },
    decays=None,
    extra="beta",
    products=4,
    compile_seconds=9.0,
)

GATED_DELTA_RULE = _matrix_states(
    "gated_delta_rule",
    delta_rule.IMPLEMENTATIONS,
    _correction,
    correction_definition,
    {
        "triton_chunks": ("delta_rule_", *INVERSE_KERNELS),
        "hopper_steps": STEP_KERNELS,
        "hopper_chunks": ("delta_rule_",),
    },
    decays=1,
    extra="beta",
    products=4,
    compile_seconds=6.0,
)

DPLR = _matrix_states(
    "dplr",
    delta_rule.DPLR_IMPLEMENTATIONS,
    _low_rank,
    low_rank_definition,
    {
        "triton_chunks": CHANNEL_DECAY_KERNELS + INVERSE_KERNELS,
        "hopper_steps": STEP_KERNELS,
        "hopper_chunks": ("dplr_",),
    },
    decays=None,
    extra="direction",
    products=4,
    compile_seconds=9.0,
)
