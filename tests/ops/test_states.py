"""Every operation with a state returns it, an unread one costs nothing, and results have the shapes that are said."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from helpers import cuda_plugin
from helpers.devices import gpus

from based_jax.errors import UserError
from based_jax.ops import (
    attention,
    conv,
    cross_entropy,
    delta_rule,
    diagonal_ssm,
    gated_conv,
    gated_linear_attention,
    gated_slot_attention,
    linear_attention,
    long_conv,
    norm,
    projection,
    segments,
    selective_scan,
    short_conv,
    softmax,
    ssd,
    taylor,
    window_attention,
    wkv4,
)
from based_jax.ops.calls import GatedConvCall, ShortConvCall
from based_jax.ops.dispatch import Implementation
from based_jax.ops.token_shift import token_shift

TOKENS, KERNEL, IDS = jnp.zeros((2, 16, 8)), jnp.zeros((3, 8)), jnp.ones((2, 16), jnp.int32)
MODES, HEADS = jnp.zeros((2, 3), jnp.complex64), jnp.zeros((2, 16, 2, 4))
RATES, STATES, CHANNELS = -jnp.ones((8, 3)), jnp.zeros((2, 16, 3)), jnp.zeros(8)

DECAY = HEADS[..., :1]
MATRIX_STATES = {
    "taylor_attention": lambda v, **options: taylor.taylor_attention(HEADS, HEADS, v, **options),
    "linear_attention": lambda v, **options: linear_attention.linear_attention(HEADS, HEADS, v, **options),
    "gated_linear_attention": lambda v, **options: gated_linear_attention.gated_linear_attention(
        HEADS, HEADS, v, DECAY, **options
    ),
    "delta_rule": lambda v, **options: delta_rule.delta_rule(HEADS, HEADS, v, DECAY, DECAY[..., 0], **options),
    "dplr": lambda v, **options: delta_rule.dplr(HEADS, HEADS, v, DECAY, HEADS, HEADS, **options),
    "gated_slot_attention": lambda v, **options: gated_slot_attention.gated_slot_attention(
        HEADS, HEADS, v, HEADS, HEADS, **options
    ),
    "ssd": lambda x, **options: ssd.ssd(x, DECAY[..., 0], -jnp.ones(2), HEADS[:, :, :1], HEADS[:, :, :1], **options),
}
"""Operations of one array of HEADS' shape, of values; 16 tokens are one chunk of each."""


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
            lambda x: conv.IMPLEMENTATIONS[impl].for_documents(unbroken=False)(
                ShortConvCall(x, KERNEL, segment_ids=segments.numbered(IDS))
            ),
        ),
        (
            lambda x: gated_conv.gated_short_conv(x, KERNEL[:, :4], segment_ids=IDS, impl=impl)[0],
            lambda x: gated_conv.IMPLEMENTATIONS[impl].for_documents(unbroken=False)(
                GatedConvCall(x, KERNEL[:, :4], segment_ids=segments.numbered(IDS))
            ),
        ),
    )
    for operation, output in pairs:
        assert program(operation, TOKENS) == program(output, TOKENS)
        assert program(gradient(operation), TOKENS) == program(gradient(output), TOKENS)


def flops(call, *arrays):
    return jax.jit(call).lower(*arrays).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("operation", MATRIX_STATES)
def test_a_matrix_state_that_nobody_reads_is_not_computed(operation):
    """At least the product that writes the tokens into it goes, 2 K V FLOPs of a token and head."""

    def call(v):
        return MATRIX_STATES[operation](v, impl="xla_chunks")

    assert flops(call, HEADS) - flops(lambda v: call(v)[0], HEADS) >= 2 * HEADS.size * HEADS.shape[-1]


def kernels(call, *arrays):
    """Return how many kernels a call is on an H100."""
    with gpus():
        text = jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return sum(text.count(f"custom_call @{name}") for name in ("mosaic_gpu", "triton_kernel_call"))


def heads(time=64, key_dim=64, batch=2):
    """Return q, k, v, decays of channels, decays of heads and rates."""
    q, v = (jnp.zeros((batch, time, 2, width), "bfloat16") for width in (key_dim, 64))
    decays = jnp.zeros((batch, time, 2, key_dim))
    return q, q, v, decays, decays[..., :1], decays[..., 0]


def by_kernels(operation, *names, impl, **sizes):
    """Return a case: an operation through its kernels, and what it takes of `heads`."""
    given = dict(zip(("q", "k", "v", "decays", "decay", "rates"), heads(**sizes), strict=True))
    return lambda *arrays: operation(*arrays, impl=impl), [given[name] for name in names]


QKV = "q", "k", "v"
CHANNEL_DECAYS, ONE_DECAY, LOW_RANK = (*QKV, "decays"), (*QKV, "decay"), (*QKV, "decays", "decays", "decays")
KERNELS = {
    "taylor, one piece": (by_kernels(taylor.taylor_attention, *QKV, impl="hopper", key_dim=16, batch=66), 1, 3),
    "taylor, pieces": (by_kernels(taylor.taylor_attention, *QKV, impl="hopper", key_dim=16, time=1024), 3, 7),
    "gla, steps": (by_kernels(gated_linear_attention.gated_linear_attention, *CHANNEL_DECAYS, impl="hopper"), 1, 2),
    "gla, chunks": (by_kernels(gated_linear_attention.gated_linear_attention, *CHANNEL_DECAYS, impl="triton"), 3, 7),
    "simple gla, chunks": (by_kernels(gated_linear_attention.gated_linear_attention, *ONE_DECAY, impl="triton"), 1, 3),
    "delta rule, chunks": (by_kernels(delta_rule.delta_rule, *ONE_DECAY, "rates", impl="triton"), 5, 7),
    "dplr, steps": (by_kernels(delta_rule.dplr, *LOW_RANK, impl="hopper"), 1, 3),
    "dplr, chunks": (by_kernels(delta_rule.dplr, *LOW_RANK, impl="triton"), 5, 9),
}


LONG_NAMES = "taylor, one piece", "taylor, pieces", "dplr, steps", "dplr, chunks"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG_NAMES else name for name in KERNELS]
)
def test_a_state_that_nobody_reads_takes_no_kernels(name, monkeypatch):
    """Those of a forward pass, and of one with its gradients, are as many as the output needs."""
    cuda_plugin.without_code(monkeypatch)
    (operation, arrays), forward, with_gradients = KERNELS[name]

    def gradients(*arrays):
        return jax.grad(lambda *xs: operation(*xs)[0].astype(jnp.float32).sum(), argnums=(0, 1, 2))(*arrays)

    assert kernels(lambda *xs: operation(*xs)[0], *arrays) == forward
    assert kernels(gradients, *arrays) == with_gradients
    assert kernels(operation, *arrays) == forward + name.startswith("taylor")


def planted(name):
    """Return a call of one of `MATRIX_STATES` that takes the implementation a test has planted."""
    return lambda: MATRIX_STATES[name](HEADS, impl="planted")


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
    "taylor_attention": (taylor.IMPLEMENTATIONS, planted("taylor_attention")),
    "linear_attention": (linear_attention.IMPLEMENTATIONS, planted("linear_attention")),
    "gated_linear_attention": (gated_linear_attention.IMPLEMENTATIONS, planted("gated_linear_attention")),
    "delta_rule": (delta_rule.IMPLEMENTATIONS, planted("delta_rule")),
    "dplr": (delta_rule.DPLR_IMPLEMENTATIONS, planted("dplr")),
    "gated_slot_attention": (gated_slot_attention.IMPLEMENTATIONS, planted("gated_slot_attention")),
    "ssd": (ssd.IMPLEMENTATIONS, planted("ssd")),
    "residual_rms_norm": (norm.IMPLEMENTATIONS, lambda: norm.residual_rms_norm(TOKENS, None, CHANNELS, impl="planted")),
    "residual_layer_norm": (
        norm.IMPLEMENTATIONS,
        lambda: norm.residual_layer_norm(TOKENS, None, CHANNELS, CHANNELS, impl="planted"),
    ),
    "linear_cross_entropy": (
        cross_entropy.IMPLEMENTATIONS,
        lambda: cross_entropy.linear_cross_entropy(TOKENS, KERNEL, jnp.zeros((2, 16), jnp.int32), impl="planted"),
    ),
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
    jax.eval_shape(lambda: call())
    monkeypatch.setitem(table, "planted", Implementation(narrower(right.compute)))
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(lambda: call())


@pytest.mark.parametrize("name", ["diagonal_ssm", "selective_scan", "wkv4", *MATRIX_STATES])
def test_a_wrong_shape_of_a_state_is_refused(name, monkeypatch):
    table, call = CALLS[name]

    def planted(call):
        y, state = table["xla_chunks"].compute(call)
        return y, jax.tree.map(lambda x: x[:, :1], state)

    monkeypatch.setitem(table, "planted", Implementation(planted))
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(lambda: call())


def narrower_product(x, kernel, *_, **__):
    return jnp.zeros((*x.shape[:-1], kernel.shape[1] - 1))


@pytest.mark.parametrize(
    "product",
    [
        lambda: projection.multiply(TOKENS, KERNEL.T),
        lambda: projection.project(TOKENS, KERNEL.T, (((2,), (0,)), ((), ()))),
    ],
)
def test_a_wrong_shape_of_a_product_is_refused(product, monkeypatch):
    product()
    monkeypatch.setattr(projection.lax, "dot_general", narrower_product)
    with pytest.raises(jaxtyping.TypeCheckError):
        product()


def convolved_on(length):
    return short_conv(TOKENS, KERNEL, state=jnp.zeros((2, length, 8)), dilation=2)


def stepped_on(length):
    return conv.short_conv_step(TOKENS[:, 0], KERNEL, jnp.zeros((2, length, 8)), dilation=2)


def convolved_and_gated_on(length):
    return gated_conv.gated_short_conv(TOKENS, KERNEL[:, :4], state=jnp.zeros((2, length, 4)))


@pytest.mark.parametrize(("operation", "length"), [(convolved_on, 5), (stepped_on, 5), (convolved_and_gated_on, 3)])
def test_a_convolution_s_state_has_the_inputs_in_reach_and_no_others(operation, length):
    assert operation(length)[1].shape[1] == length
    for wrong in (length - 1, length + 1):
        with pytest.raises(UserError):
            operation(wrong)


@pytest.mark.parametrize(
    ("module", "operation"),
    [
        (conv, lambda: short_conv(TOKENS, KERNEL)),
        (gated_conv, lambda: gated_conv.gated_short_conv(TOKENS, KERNEL[:, :4])),
    ],
)
def test_a_convolution_s_wrong_state_is_refused(module, operation, monkeypatch):
    monkeypatch.setattr(module, "last_inputs", lambda x, width, *_: jnp.zeros((2, width + 1, x.shape[2])))
    with pytest.raises(jaxtyping.TypeCheckError):
        operation()


@pytest.mark.parametrize("state", [jnp.zeros((2, 7)), jnp.zeros((1, 8)), jnp.zeros((2, 1, 8))])
def test_a_wrong_shape_of_the_token_before_is_refused(state):
    with pytest.raises(UserError):
        token_shift(TOKENS, state=state)


def test_a_wrong_shape_of_a_shift_is_refused(monkeypatch):
    token_shift(TOKENS)
    join = jnp.concatenate
    monkeypatch.setattr(jnp, "concatenate", lambda *arrays, **options: join(*arrays, **options)[..., :1])
    with pytest.raises(jaxtyping.TypeCheckError):
        token_shift(TOKENS)
