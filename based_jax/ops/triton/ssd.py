"""Which calls of Mamba-2's state space go by chunks in Triton kernels, as those of gated linear attention they are."""

from based_jax.ops.triton import chunks


def supports(x, dt, A, B, C, state, segment_ids) -> str | None:
    """Return why the kernels cannot run this call, or None."""
    return chunks.supports(x, B.shape[3])


def slower(x, dt, A, B, C, state, segment_ids) -> str | None:
    """Return why `auto` leaves a call to others, or None."""
    return chunks.slower(x)
