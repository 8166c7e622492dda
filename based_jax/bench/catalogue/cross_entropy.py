"""The head and its loss: cross-entropy of a linear layer over a vocabulary."""

import functools

import jax
import jax.numpy as jnp

from based_jax.bench.catalogue.operation import BF16, FORWARD, FP32, Arrays, Case, Function, Operation, bf16, by_channel
from based_jax.labels import NO_LABEL, is_labelled
from based_jax.ops import cross_entropy

TIMED_VOCAB = 8192
"""Of what is timed: that of the recall tasks."""
HIDDEN_SCALE = 0.125
"""Of hidden states: logits of normal ones are then a few units large. A power of two, which no dtype rounds."""


def _arrays(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    (batch, channels, time), [vocab] = case.shape, case.dims
    return bf16({"hidden": (batch, time, channels), "table": (vocab, channels)})


def _function(case: Case) -> Function:
    def run(arrays, ids):
        hidden = arrays["hidden"]
        ids = jnp.ones(hidden.shape[:2], jnp.int32) if ids is None else ids
        given = hidden, arrays["table"], labels(ids, case.dims[0])
        losses, _ = cross_entropy.linear_cross_entropy(*given, impl=case.impl)
        return {"losses": losses[..., None]}

    return run


def labels(ids: jax.Array, vocab: int) -> jax.Array:
    """Return a label for each token that depends on its place alone, none for padding and every fifth token."""
    places = jnp.arange(ids.shape[1])
    spread = jnp.where(places % 5 == 4, NO_LABEL, places * 104729 % vocab)[None]
    return jnp.where(ids == 0, NO_LABEL, spread).astype(jnp.int32)


def definition(arrays: Arrays, ids: jax.Array) -> Arrays:
    """Return log sum_v exp(h . table_v) - h . table_label, 0 without a label."""
    logits = jnp.einsum("btd,vd->btv", arrays["hidden"], arrays["table"])
    chosen = labels(ids, logits.shape[-1])
    own = jnp.take_along_axis(logits, jnp.maximum(chosen, 0)[..., None], axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - own
    return {"losses": jnp.where(is_labelled(chosen)[..., None], losses, 0)}


def _cost(case: Case, which: str) -> tuple[float, float]:
    """Count hidden states and table in bf16, losses in fp32, and no logits, which the backward pass makes anew."""
    (batch, channels, time), [vocab] = case.shape, case.dims
    rows = batch * time
    read, product = BF16 * channels * (rows + vocab), 2.0 * rows * channels * vocab
    forward = read + FP32 * rows, product
    # The gradients: what is read and the losses' gradients once more; the logits, and a product for each result.
    return forward if which == FORWARD else (forward[0] + 2 * read + FP32 * rows, 4 * product)


def _cases() -> tuple[Case, ...]:
    make = functools.partial(Case, "linear_cross_entropy")
    return (
        *(make((2, 48, time), (1000,), documents=time > 1) for time in (1, 65)),
        *(make((3, channels, 130), (1001,), documents=True) for channels in (64, 128, 192, 256)),
        make((8, 128, 1024), (8192,), quick=True),
        make((1, 64, 1000), (50257,), quick=True),
        *(make((4, 64, 130), (1000,), documents=True, through=x) for x in ("vmap", "shard_map")),
    )


LINEAR_CROSS_ENTROPY = Operation(
    table=cross_entropy.IMPLEMENTATIONS,
    arrays=_arrays,
    function=_function,
    oracle=lambda case: definition,
    cost=_cost,
    kernels={"hopper_tiles": ("cross_entropy_",)},
    cases=_cases(),
    small_cases=(Case("linear_cross_entropy", (1, 64, 130), (300,), documents=True),),
    timed={"linear_cross_entropy": by_channel("linear_cross_entropy", (TIMED_VOCAB,))},
    weights=frozenset({"table"}),
    scales={"hidden": HIDDEN_SCALE},
)
