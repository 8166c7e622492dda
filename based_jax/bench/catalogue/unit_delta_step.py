"""A token of a delta rule on unit queries and keys, read where its product stands. It has no gradient."""

import functools

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.operation import FORWARD, Arrays, Case, Function, Operation, Shape, moved_bytes, narrow
from based_jax.ops import unit_delta_step

TIMED_DIMS = 256, 512


def _arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a token's product (B, H (2 K + V)), the gates before their functions, and the state, of `dims` (K, V)."""
    (batch, heads), (keys, values) = case.shape, case.dims
    found = narrow(case, {"joint": (batch, heads * (2 * keys + values))})
    wide = {"decay": (batch, heads), "rate": (batch, heads), "before": (batch, heads, keys, values)}
    return found | {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in wide.items()}


def _function(case: Case) -> Function:
    def run(arrays: Arrays, ids: jax.Array | None) -> Arrays:
        log_decay, beta = -jax.nn.softplus(arrays["decay"])[..., None], jax.nn.sigmoid(arrays["rate"])
        step = unit_delta_step.unit_delta_step(arrays["joint"], log_decay, beta, arrays["before"], impl=case.impl)
        return dict(zip(("o", "after"), step, strict=True))

    return run


def definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return o = q . S' / sqrt(K) and S' = w S + beta k (v - k . w S), of q and k by their lengths."""
    joint, before = arrays["joint"], arrays["before"]
    B, H, K, _ = before.shape
    q, k, v = (x.reshape(B, H, -1) for x in jnp.split(joint, [H * K, 2 * H * K], axis=1))
    q, k = (x / jnp.sqrt((x * x).sum(axis=2, keepdims=True) + 1e-6) for x in (q, k))
    kept = before / (1 + jnp.exp(arrays["decay"]))[..., None, None]
    beta = 1 / (1 + jnp.exp(-arrays["rate"]))
    new = beta[..., None] * (v - (k[..., None] * kept).sum(axis=2))
    after = kept + k[..., None] * new[..., None, :]
    return {"o": (q[..., None] * after).sum(axis=2) / K**0.5, "after": after}


def _timed(shape: Shape) -> Case:
    """Return that of B sequences, whatever their length."""
    return Case("unit_delta_step", shape[:2], TIMED_DIMS)


make = functools.partial(Case, "unit_delta_step")
UNIT_DELTA_STEP = Operation(
    table=unit_delta_step.IMPLEMENTATIONS,
    arrays=_arrays,
    function=_function,
    oracle=lambda case: definition,
    # Numbers that meet once: their products take no time.
    cost=lambda case, which: (moved_bytes(_arrays(case), _function(case.by("xla"))), 0.0),
    kernels={"hopper_states": ("unit_delta_step",)},
    cases=(
        make((1, 3), (48, 96), quick=True),
        *(make((5, 3), (48, 96), dtype=dtype) for dtype in ("bfloat16", "float32")),
        make((3, 1), (16, 32), dtype="float32"),
        make((2, 2), (256, 160)),
        *(make((batch, 4), TIMED_DIMS) for batch in (1, 128)),
    ),
    small_cases=(make((2, 2), (16, 32)),),
    timed={"unit_delta_step": _timed},
    passes=(FORWARD,),
    updates={"before": "after"},
    compile_seconds=2.0,
)
