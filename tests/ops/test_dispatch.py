import logging

import jax
import jax.numpy as jnp
import pytest
from helpers.devices import H100, gpus
from jax.sharding import AbstractDevice, AbstractMesh

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
    selective_scan,
    short_conv,
    softmax,
    ssd,
    taylor,
    taylor_attention,
    window_attention,
    wkv4,
)
from based_jax.ops.calls import AttentionCall
from based_jax.ops.dispatch import Implementation, beside, choose, dispatch, named, target_platform
from based_jax.ops.softmax import ATTENTION, WINDOW_ATTENTION, whole_pass_head_dim
from based_jax.ops.token_shift import token_shift


def only_even(x):
    return None if x % 2 == 0 else f"{x} is odd"


TABLE = {
    "elsewhere_chunks": Implementation(lambda x: "elsewhere_chunks", platform="tpu"),
    "even_chunks": Implementation(lambda x: "even_chunks", only_even, platform="cpu"),
    "xla_chunks": Implementation(lambda x: "xla_chunks"),
    "xla_steps": Implementation(lambda x: "xla_steps"),
    "even_halves": Implementation(lambda x: "even_halves"),
}


def gpu_mesh():
    return AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("NVIDIA H100", None, "gpu"))


def test_auto_takes_what_runs_here_and_supports_the_call():
    assert dispatch("auto_takes", TABLE, "auto", 2) == "even_chunks"


def test_auto_falls_back_and_says_once_why(caplog):
    with caplog.at_level(logging.INFO, logger="based_jax.ops.dispatch"):
        for x in (3, 3, 5, 2, 3):
            dispatch("falls_back", TABLE, "auto", x)
    reasons = [f"falls_back: 'xla_chunks' instead of 'even_chunks': {x} is odd." for x in (3, 5)]
    assert caplog.messages == reasons


def test_auto_on_another_platform_is_silent(caplog):
    with caplog.at_level(logging.INFO), jax.sharding.use_abstract_mesh(gpu_mesh()):
        assert dispatch("silent", TABLE, "auto", 3) == "xla_chunks"
    assert not caplog.messages


def test_unknown_name_suggests_the_nearest():
    names = "auto, elsewhere, elsewhere_chunks, even, even_chunks, even_halves, xla, xla_chunks, xla_steps"
    with pytest.raises(
        UserError, match=rf"^Unknown op implementation 'evn': did you mean 'even'\? Allowed: {names}\.$"
    ):
        dispatch("op", TABLE, "evn", 2)


def test_a_backend_s_name_is_its_first_entry():
    for impl, name in (("even", "even_chunks"), ("xla", "xla_chunks"), ("xla_steps", "xla_steps"), ("oracle", None)):
        assert named(TABLE, impl) == name
    assert dispatch("bare", TABLE, "even", 2) == "even_chunks"
    with pytest.raises(UserError, match="bare: impl='even' cannot run this call: 3 is odd"):
        dispatch("bare", TABLE, "even", 3)


def test_what_bare_names_meant_before_there_were_forms_they_still_mean():
    tables = (
        (conv, {"hopper": "hopper_taps", "xla": "xla_taps"}),
        (cross_entropy, {"hopper": "hopper_tiles", "xla": "xla_logits"}),
        (delta_rule, {"triton": "triton_chunks", "hopper": "hopper_steps", "xla": "xla_chunks"}),
        (diagonal_ssm, {"xla": "xla_chunks"}),
        (gated_conv, {"hopper": "hopper_taps", "xla": "xla_taps"}),
        (gated_linear_attention, {"triton": "triton_chunks", "hopper": "hopper_steps", "xla": "xla_chunks"}),
        (linear_attention, {"xla": "xla_chunks"}),
        (long_conv, {"xla": "xla_fft"}),
        (norm, {"hopper": "hopper_rows", "xla": "xla_rows"}),
        (selective_scan, {"hopper": "hopper_steps", "xla": "xla_chunks"}),
        (ssd, {"triton": "triton_chunks", "hopper": "hopper_steps", "xla": "xla_chunks"}),
        (taylor, {"hopper": "hopper_chunks", "triton": "triton_chunks", "xla": "xla_chunks"}),
        (wkv4, {"hopper": "hopper_steps", "xla": "xla_chunks"}),
    )
    for module, names in tables:
        assert {impl: named(module.IMPLEMENTATIONS, impl) for impl in names} == names, module.__name__
    assert named(ATTENTION, "xla") == "xla_quadratic" and named(ATTENTION, "cudnn") == "cudnn_flash"
    assert named(WINDOW_ATTENTION, "xla") == "xla_bands" and named(WINDOW_ATTENTION, "hopper") == "hopper_tiles"


@pytest.mark.parametrize(
    ("impl", "name", "tables"),
    [
        (
            "recurrent",
            "xla_steps",
            [
                conv.IMPLEMENTATIONS,
                delta_rule.IMPLEMENTATIONS,
                delta_rule.DPLR_IMPLEMENTATIONS,
                diagonal_ssm.IMPLEMENTATIONS,
                gated_conv.IMPLEMENTATIONS,
                gated_linear_attention.IMPLEMENTATIONS,
                gated_slot_attention.IMPLEMENTATIONS,
                linear_attention.IMPLEMENTATIONS,
                selective_scan.IMPLEMENTATIONS,
                ssd.IMPLEMENTATIONS,
                taylor.IMPLEMENTATIONS,
                wkv4.IMPLEMENTATIONS,
                WINDOW_ATTENTION,
            ],
        ),
        (
            "quadratic",
            "xla_quadratic",
            [gated_linear_attention.IMPLEMENTATIONS, linear_attention.IMPLEMENTATIONS, taylor.IMPLEMENTATIONS],
        ),
        (
            "toeplitz",
            "xla_toeplitz",
            [conv.IMPLEMENTATIONS, diagonal_ssm.IMPLEMENTATIONS, long_conv.IMPLEMENTATIONS],
        ),
        ("cudnn", "cudnn_flash", [ATTENTION, WINDOW_ATTENTION]),
    ],
)
def test_names_of_forms_without_a_backend_still_run(impl, name, tables):
    for table in tables:
        assert named(table, impl) == name


def test_a_former_name_is_none_where_the_form_is_missing():
    assert named(long_conv.IMPLEMENTATIONS, "recurrent") is None
    with pytest.raises(UserError, match=r"^Unknown long_conv implementation 'recurrent': "):
        long_conv.long_conv(jnp.ones((1, 4, 8)), jnp.ones((4, 8)), impl="recurrent")


@pytest.mark.parametrize(
    ("impl", "beside_it"),
    [
        *((name, name) for name in ("auto", "xla", "xla_steps", "oracle", "recurrent", "elsewhere")),
        ("xla_chunks", "xla"),
        ("xla_fft", "xla"),
        ("xla_toeplitz", "auto"),
        ("toeplitz", "auto"),
    ],
)
def test_what_runs_beside_a_mixer_s_main_operation(impl, beside_it):
    assert beside(impl, conv.IMPLEMENTATIONS) == beside_it


X, HEADS_X, GATES = jnp.ones((2, 4)), jnp.ones((2, 2, 4)), jnp.ones((2, 2, 1))
MODES, MATRIX = jnp.ones((2, 3), jnp.complex64), jnp.zeros((2, 2, 4, 4))
SCOPES = {
    "short_conv_step": lambda: conv.short_conv_step(X, jnp.ones((3, 4)), jnp.zeros((2, 3, 4))),
    "last_inputs": lambda: conv.last_inputs(X[:, None], 3, None, None),
    "delta_rule_step": lambda: delta_rule.delta_rule_step(*(HEADS_X,) * 3, GATES, GATES[..., 0], MATRIX),
    "dplr_step": lambda: delta_rule.dplr_step(*(HEADS_X,) * 6, MATRIX),
    "diagonal_ssm_step": lambda: diagonal_ssm.diagonal_ssm_step(HEADS_X, *(MODES,) * 3, jnp.zeros((2, 2, 4, 3, 2))),
    "gated_linear_attention_step": lambda: gated_linear_attention.gated_linear_attention_step(*(HEADS_X,) * 4, MATRIX),
    "gated_slot_attention_step": lambda: gated_slot_attention.gated_slot_attention_step(
        *(HEADS_X,) * 5, gated_slot_attention.SlotState(MATRIX, MATRIX)
    ),
    "linear_attention_step": lambda: linear_attention.linear_attention_step(*(HEADS_X,) * 3, jnp.zeros((2, 2, 4, 5))),
    "encoder_state": lambda: linear_attention.encoder_state(*(HEADS_X[:, None],) * 2, jnp.ones((2, 1))),
    "selective_scan_step": lambda: selective_scan.selective_scan_step(
        X, X, jnp.ones((4, 3)), *(jnp.ones((2, 3)),) * 2, jnp.zeros((2, 4, 3))
    ),
    "masked_attention": lambda: softmax.masked_attention(*(HEADS_X[:, None],) * 3, jnp.ones((2, 1, 1), bool)),
    "ssd_step": lambda: ssd.ssd_step(HEADS_X, GATES[..., 0], jnp.ones(2), HEADS_X, HEADS_X, MATRIX),
    "wkv4_step": lambda: wkv4.wkv4_step(X, X, X[0], X[0], wkv4.initial_state(2, 4)),
    "token_shift": lambda: token_shift(X[:, None]),
    "multiply": lambda: projection.multiply(X, jnp.ones((4, 3))),
    "project": lambda: projection.project(X, jnp.ones((4, 3)), (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("name", SCOPES)
def test_what_is_not_dispatched_is_a_scope_of_its_name(name):
    assert f"/{name}/" in jax.jit(SCOPES[name]).lower().as_text(debug_info=True)


def test_an_operation_is_a_scope_of_its_name():
    q = jnp.ones((1, 4, 1, 8))
    text = jax.jit(lambda q: taylor_attention(q, q, q, impl="xla")).lower(q).as_text(debug_info=True)
    assert "/taylor_attention/" in text


def test_named_implementation_that_cannot_run_says_why():
    with pytest.raises(UserError, match="op: impl='even' cannot run this call: 3 is odd"):
        dispatch("op", TABLE, "even", 3)
    with pytest.raises(UserError, match="impl='elsewhere' cannot run this call: it needs tpu, and this is cpu"):
        dispatch("op", TABLE, "elsewhere", 2)


def test_platform_is_the_one_that_is_compiled_for():
    assert target_platform() == "cpu"
    with jax.sharding.use_abstract_mesh(gpu_mesh()):
        assert target_platform() == "cuda"
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert target_platform() == "cpu"


@pytest.mark.parametrize("impl", ["cudnn", "xlaa"])
def test_operations_refuse_what_they_cannot_run(impl):
    q, x = jnp.ones((1, 4, 1, 8), jnp.bfloat16), jnp.ones((1, 4, 8))
    calls = {
        "taylor_attention": lambda: taylor_attention(q, q, q, impl=impl),
        "attention": lambda: attention(q, q, q, impl=impl),
        "window_attention": lambda: window_attention(q, q, q, window=2, impl=impl),
        "short_conv": lambda: short_conv(x, jnp.ones((3, 8)), impl=impl),
    }
    for name, call in calls.items():
        with pytest.raises(UserError, match=name):
            call()


@pytest.mark.parametrize("window", [0, -3])
def test_window_below_one_is_refused(window):
    q = jnp.ones((1, 4, 1, 8))
    with pytest.raises(UserError, match=f"window is {window}; .* at least 1"):
        window_attention(q, q, q, window=window)


@pytest.mark.parametrize(
    ("dtype", "head_dims", "packed", "reason"),
    [
        ("bfloat16", (64, 64), False, None),
        ("float16", (128, 128), False, None),
        ("float32", (64, 64), False, "float32"),
        ("bfloat16", (64, 64), True, "mask"),
        ("bfloat16", (64, 32), False, None),
        ("bfloat16", (70, 70), False, None),
        ("bfloat16", (64, 136), False, "at most 128, these are 64 and 136"),
    ],
)
def test_cudnn_predicate(dtype, head_dims, packed, reason):
    q, v = (jnp.ones((1, 4, 1, size), dtype) for size in head_dims)
    call = AttentionCall(q, q, v, 2, jnp.ones((1, 4), jnp.int32) if packed else None)
    answer = WINDOW_ATTENTION["cudnn_flash"].supports(call)
    assert answer is None if reason is None else reason in answer


@pytest.mark.parametrize(
    ("kind", "head_dim", "given", "impl"),
    [
        (H100, 64, 64, "cudnn_flash"),
        (H100, 70, 80, "hopper_turns"),
        (H100, 90, 96, "cudnn_flash"),
        ("NVIDIA A100-SXM4-80GB", 70, 72, "cudnn_flash"),
    ],
)
def test_attention_of_whole_sequences_has_heads_that_its_fastest_kernels_take(kind, head_dim, given, impl):
    with gpus(kind):
        size = whole_pass_head_dim(head_dim)
        x = jnp.zeros((1, 256, 2, size), "bfloat16")
        chosen = choose("attention", ATTENTION, "auto", AttentionCall(x, x, x, 256, None, head_dim))
    assert (size, chosen) == (given, impl)
