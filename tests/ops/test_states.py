"""Every operation with a state returns it, an unread one costs nothing, and results have the shapes that are said."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from based_jax.ops import (
    attention,
    conv,
    diagonal_ssm,
    gated_conv,
    long_conv,
    norm,
    selective_scan,
    short_conv,
    softmax,
    window_attention,
    wkv4,
)
from based_jax.ops.calls import GatedConvCall, ShortConvCall
from based_jax.ops.dispatch import Implementation
from based_jax.ops.token_shift import token_shift

TOKENS, KERNEL, IDS = jnp.zeros((2, 16, 8)), jnp.zeros((3, 8)), jnp.ones((2, 16), jnp.int32)
MODES, HEADS = jnp.zeros((2, 3), jnp.complex64), jnp.zeros((2, 16, 2, 4))
RATES, STATES, CHANNELS = -jnp.ones((8, 3)), jnp.zeros((2, 16, 3)), jnp.zeros(8)


def program(call, *arrays):
    """Return what XLA gets of a call."""
    return jax.jit(call).lower(*arrays).as_text()


def gradient(call):
    return jax.grad(lambda x: jnp.sum(call(x)))


@pytest.mark.parametrize(
    "operation, x",
    [
        (lambda x: short_conv(x, KERNEL, segment_ids=IDS), TOKENS),
        (lambda x: gated_conv.gated_short_conv(x, KERNEL[:, :4], segment_ids=IDS), TOKENS),
        (lambda x: token_shift(x, segment_ids=IDS), TOKENS),
        (lambda x: diagonal_ssm.diagonal_ssm(x, *(MODES,) * 3, impl="xla_chunks"), HEADS),
        (lambda x: diagonal_ssm.diagonal_ssm(x, *(MODES,) * 3, impl="xla_toeplitz"), HEADS),
    ],
    ids=["short_conv", "gated_short_conv", "token_shift", "diagonal_ssm in a chunk", "diagonal_ssm as a product"],
)
def test_a_state_that_nobody_reads_is_left_out(operation, x):
    bare, both = (program(call, x).count("\n") for call in (lambda x: operation(x)[0], operation))
    assert bare < both


@pytest.mark.parametrize("impl", ["xla_taps", "xla_steps"])
def test_a_convolution_s_program_is_that_of_its_output_alone(impl):
    """The gradient's, too."""
    pairs = (
        (
            lambda x: short_conv(x, KERNEL, segment_ids=IDS, impl=impl)[0],
            lambda x: conv.IMPLEMENTATIONS[impl].compute(ShortConvCall(x, KERNEL, segment_ids=IDS)),
        ),
        (
            lambda x: gated_conv.gated_short_conv(x, KERNEL[:, :4], segment_ids=IDS, impl=impl)[0],
            lambda x: gated_conv.IMPLEMENTATIONS[impl].compute(GatedConvCall(x, KERNEL[:, :4], segment_ids=IDS)),
        ),
    )
    for operation, output in pairs:
        assert program(operation, TOKENS) == program(output, TOKENS)
        assert program(gradient(operation), TOKENS) == program(gradient(output), TOKENS)


CALLS = {
    "attention": (softmax.ATTENTION, lambda: attention(HEADS, HEADS, HEADS, impl="planted")),
    "window_attention": (
        softmax.WINDOW_ATTENTION,
        lambda: window_attention(HEADS, HEADS, HEADS, window=3, impl="planted"),
    ),
    "short_conv": (conv.IMPLEMENTATIONS, lambda: short_conv(TOKENS, KERNEL, impl="planted")),
    "gated_short_conv": (
        gated_conv.IMPLEMENTATIONS,
        lambda: gated_conv.gated_short_conv(TOKENS, KERNEL[:, :4], impl="planted"),
    ),
    "long_conv": (long_conv.IMPLEMENTATIONS, lambda: long_conv.long_conv(TOKENS, TOKENS[0], impl="planted")),
    "diagonal_ssm": (
        diagonal_ssm.IMPLEMENTATIONS,
        lambda: diagonal_ssm.diagonal_ssm(HEADS, *(MODES,) * 3, impl="planted"),
    ),
    "selective_scan": (
        selective_scan.IMPLEMENTATIONS,
        lambda: selective_scan.selective_scan(TOKENS, TOKENS, RATES, STATES, STATES, impl="planted"),
    ),
    "wkv4": (wkv4.IMPLEMENTATIONS, lambda: wkv4.wkv4(TOKENS, TOKENS, CHANNELS, CHANNELS, impl="planted")),
    "residual_rms_norm": (norm.IMPLEMENTATIONS, lambda: norm.residual_rms_norm(TOKENS, None, CHANNELS, impl="planted")),
}


def narrower(compute):
    """Return an implementation whose output has lost its last channel, and nothing else."""

    def planted(call):
        out = compute(call)
        return (out[0][..., :-1], *out[1:]) if isinstance(out, tuple) else out[..., :-1]

    return planted


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_shape_of_a_result_is_refused(name, monkeypatch):
    table, call = CALLS[name]
    right = next(table[key] for key in table if key.startswith("xla"))
    monkeypatch.setitem(table, "planted", Implementation(right.compute))
    call()
    monkeypatch.setitem(table, "planted", Implementation(narrower(right.compute)))
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


@pytest.mark.parametrize("name", ["diagonal_ssm", "selective_scan"])
def test_a_wrong_shape_of_a_state_is_refused(name, monkeypatch):
    table, call = CALLS[name]

    def planted(call):
        y, state = table["xla_chunks"].compute(call)
        return y, state[:, :1]

    monkeypatch.setitem(table, "planted", Implementation(planted))
    with pytest.raises(jaxtyping.TypeCheckError):
        call()
