"""A diagonal plus low rank transition in Hopper kernels, token by token (`recurrence.py`)."""

from based_jax.dims import BHKV, BTHV
from based_jax.ops.hopper import recurrence


def supports(xs, scale, state, segment_ids) -> str | None:
    """Return why the kernels cannot run this call, or None; of `delta_rule` as well."""
    q, _, v, *_ = xs
    return recurrence.supports(q, v)


def compute(xs, scale, state, segment_ids) -> tuple[BTHV, BHKV]:
    """Return o and the state after the last token, each device for its rows and heads."""
    q, k, v, log_decay, a, b = xs
    return recurrence.recurrence(q, k, v, log_decay, (a, b), scale, state, segment_ids)
