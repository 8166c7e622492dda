"""A token of Mamba between its products: the selective scan's step, the skip and the gate. It has no gradient."""

import functools

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.operation import (
    FORWARD,
    HEAD_DIM,
    Arrays,
    Case,
    Function,
    Operation,
    bf16,
    fp32,
    moved_bytes,
)
from based_jax.ops import gated_scan_step

LOW_CHANNELS = 32
"""Of the product that B and C are last in."""


def _arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a token's (B, D), what B, C and z stand behind in, the state, and A (D, N), of `dims` (N,)."""
    (batch, channels), [states] = case.shape, case.dims
    narrow = {"selected": (batch, LOW_CHANNELS + 2 * states), "joint": (batch, 2 * channels)}
    of_tokens = bf16(narrow | dict.fromkeys(("u", "raw"), (batch, channels)))
    of_channels = {"A": (channels, states), "bias": (channels,), "skip": (channels,)}
    return of_tokens | fp32(of_channels | {"before": (batch, channels, states)})


def _function(case: Case) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        given = {name: x for name, x in arrays.items() if name not in ("A", "before")}
        A, state = -jnp.exp(arrays["A"]), arrays["before"]
        x, after = gated_scan_step.gated_scan_step(**given, A=A, state=state, impl=case.impl)
        return {"x": x, "after": after}

    return run


def definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return (C . h' + skip u) silu(z), and h' = exp(dt A) h + dt u B with dt = softplus(raw + bias)."""
    a, states = arrays, arrays["A"].shape[1]
    dt = jnp.logaddexp(a["raw"] + a["bias"][None], 0)
    B, C = a["selected"][:, None, -2 * states : -states], a["selected"][:, None, -states:]
    after = jnp.exp(-dt[..., None] * jnp.exp(a["A"])[None]) * a["before"] + (dt * a["u"])[..., None] * B
    z = a["joint"][:, a["u"].shape[1] :]
    y = jnp.sum(after * C, axis=2) + a["skip"][None] * a["u"]
    return {"x": y * z / (1 + jnp.exp(-z)), "after": after}


make = functools.partial(Case, "gated_scan_step")
GATED_SCAN_STEP = Operation(
    table=gated_scan_step.IMPLEMENTATIONS,
    arrays=_arrays,
    function=_function,
    oracle=lambda case: definition,
    # Numbers that meet once: their products take no time.
    cost=lambda case, which: (moved_bytes(_arrays(case), _function(case.by("xla"))), 0.0),
    kernels={"hopper_states": ("gated_scan_step",)},
    cases=(
        make((3, 384), (16,), quick=True),
        *(make((5, 128), (states,)) for states in (8, 32)),
        *(make((batch, 4096), (16,)) for batch in (1, 128)),
    ),
    small_cases=(make((2, 128), (16,)),),
    timed={"gated_scan_step": lambda shape: make((shape[0], shape[1] * HEAD_DIM), (16,))},
    weights=frozenset({"A", "bias", "skip"}),
    passes=(FORWARD,),
    updates={"before": "after"},
    compile_seconds=2.0,
)
