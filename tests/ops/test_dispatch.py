import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from based_jax.errors import UserError
from based_jax.ops import attention, short_conv, taylor_attention, window_attention
from based_jax.ops.dispatch import Implementation, dispatch, target_platform
from based_jax.ops.softmax import WINDOW_ATTENTION


def only_even(x):
    return None if x % 2 == 0 else f"{x} is odd"


TABLE = {
    "elsewhere": Implementation(lambda x: "elsewhere", platform="tpu"),
    "even": Implementation(lambda x: "even", only_even, platform="cpu"),
    "xla": Implementation(lambda x: "xla"),
}


def gpu_mesh():
    return AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("NVIDIA H100", None, "gpu"))


def test_auto_takes_what_runs_here_and_supports_the_call():
    assert dispatch("auto_takes", TABLE, "auto", 2) == "even"


def test_auto_falls_back_and_says_once_why(caplog):
    with caplog.at_level(logging.INFO, logger="based_jax.ops.dispatch"):
        for x in (3, 3, 5, 2, 3):
            dispatch("falls_back", TABLE, "auto", x)
    reasons = ["falls_back: 'xla' instead of 'even': 3 is odd.", "falls_back: 'xla' instead of 'even': 5 is odd."]
    assert caplog.messages == reasons


def test_auto_on_another_platform_is_silent(caplog):
    with caplog.at_level(logging.INFO), jax.sharding.use_abstract_mesh(gpu_mesh()):
        assert dispatch("silent", TABLE, "auto", 3) == "xla"
    assert not caplog.messages


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"Unknown op implementation 'evn': did you mean 'even'\? Allowed: auto, else"):
        dispatch("op", TABLE, "evn", 2)


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
        ("bfloat16", (64, 32), False, "64 and 32"),
        ("bfloat16", (70, 70), False, "70 and 70"),
        ("bfloat16", (256, 256), False, "256 and 256"),
    ],
)
def test_cudnn_predicate(dtype, head_dims, packed, reason):
    q, v = (jnp.ones((1, 4, 1, size), dtype) for size in head_dims)
    answer = WINDOW_ATTENTION["cudnn"].supports(q, q, v, jnp.ones((1, 4), jnp.int32) if packed else None, 2)
    assert answer is None if reason is None else reason in answer
