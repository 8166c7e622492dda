"""The norm's TPU kernels: refusals, values in the interpreter, on one device and on eight, and what is compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import parametrize_some
from helpers.devices import tpus
from helpers.tpu_compiler import SLICES, compiled_text, lowered_kernels, needs_libtpu
from helpers.tpu_interpreter import interpreted

from based_jax import parallel
from based_jax.ops import norm
from based_jax.ops.calls import NormCall
from based_jax.ops.dispatch import recorded_choices
from based_jax.ops.tpu import norm as tpu_norm
from pallas_kernels.tpu import norm as kernels


def call_of(D=256, B=2, T=512, r=jnp.float32, y=jnp.bfloat16, dtype="bfloat16", centered=False):
    x = jnp.zeros((B, T, D), r)
    bias = jnp.zeros(D) if centered else None
    return NormCall(x, None if y is None else x.astype(y), jnp.ones(D), bias, 1e-5, jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (call_of(r=jnp.bfloat16), "r must be float32, and is bfloat16"),
        (call_of(y=jnp.float16), "y must be bfloat16 or float32, and is float16"),
        (call_of(dtype="float16"), "the norm must be bfloat16 or float32, and is float16"),
        (call_of(D=8200), "at most 8192, and are 8200"),
        (call_of(B=0), "no dimension may be empty, and r is (0, 512, 256)"),
    ],
)
def test_refusals_name_the_value(call, words):
    assert words in tpu_norm.supports(call)
    assert tpu_norm.supports(call_of(D=70, y=None, dtype="float32")) is None


@pytest.mark.parametrize(
    ("time", "channels", "tokens"), [(1, 128, 16), (70, 128, 64), (2048, 1792, 128), (99, 8192, 32)]
)
def test_a_program_has_the_tokens_that_there_are_and_fit(time, channels, tokens):
    assert kernels.block_tokens(time, channels) == tokens


# (shape, y's dtype, dtype, centered): one part of a block and several, blocks that end behind the last token, several
# registers of channels and parts of one; both norms, with y and without.
CASES = [
    ((2, 20, 200), "bfloat16", "bfloat16", True),
    ((1, 75, 70), "bfloat16", "bfloat16", False),
    ((3, 130, 128), "float32", "float32", True),
    ((2, 33, 384), "bfloat16", "float32", False),
    ((1, 9, 24), None, "float32", False),
    ((2, 48, 256), None, "bfloat16", True),
    ((35, 70), "float32", "bfloat16", False),
]


def exact(call, *arrays):
    wide = [None if x is None else jnp.asarray(x, jnp.float32) for x in arrays]
    return norm._xla(NormCall(*wide, call.eps, jnp.dtype("float32")))


@parametrize_some("shape, y, dtype, centered", CASES, CASES[:2])
def test_they_equal_the_oracle(shape, y, dtype, centered, normal, out_and_grads, close):
    """Forward and gradients; nothing races, and what nothing has written is NaN."""
    r, scale = 1 + normal(*shape), normal(shape[-1])
    added, bias = None if y is None else normal(*shape, dtype=y), normal(shape[-1]) if centered else None
    call = NormCall(r, added, scale, bias, 1e-3, jnp.dtype(dtype))
    cotangents = normal(*shape), normal(*shape, dtype=dtype)
    with interpreted():
        found = out_and_grads(lambda *x: tpu_norm.compute(NormCall(*x, *call[4:])), call[:4], cotangents)
        found = jax.block_until_ready(found)
    wide = tuple(np.asarray(x, np.float32) for x in cotangents)
    right = out_and_grads(functools.partial(exact, call), call[:4], wide)
    assert found[0][1].dtype == dtype
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        close(ours, theirs, "bfloat16" if ours.dtype == jnp.bfloat16 else dtype)


@pytest.mark.parametrize("size", [1e-30, 1e15])
def test_extreme_streams_have_norms_too(size, normal, close):
    r = size * normal(1, 16, 40)
    call = NormCall(r, None, np.ones(40, np.float32), None, 1e-5, jnp.dtype("float32"))
    with interpreted():
        found = jax.block_until_ready(jax.jit(lambda r: tpu_norm.compute(call._replace(r=r))[1])(r))
    close(found, exact(call, *call[:4])[1])


@parametrize_some("centered", [False, True], [True])
def test_eight_devices_equal_one(centered, normal, out_and_grads, close):
    """Rows over four devices, and time over two; parameters are all devices', whose gradients are summed."""
    r, scale, bias = normal(4, 12, 40), normal(40), normal(40) if centered else None
    given, cotangents = (r, normal(4, 12, 40), scale, bias), (normal(4, 12, 40), normal(4, 12, 40))
    call = NormCall(*given, 1e-5, jnp.dtype("float32"))
    mesh = parallel.make_mesh({"data": 4, "sequence": 2}, jax.devices())
    with interpreted(), jax.set_mesh(mesh):
        run = out_and_grads(lambda *x: tpu_norm.compute(NormCall(*x, *call[4:])), given, cotangents)
        found = jax.device_get(run)
    close(found, out_and_grads(functools.partial(exact, call), given, cotangents))


def loss(r, y, scale):
    total, x = norm.residual_rms_norm(r, y, scale)
    return jnp.sum(total**2) + jnp.sum(x.astype(jnp.float32) ** 2)


@pytest.mark.parametrize(
    ("kind", "rows", "rms", "layer"),
    [
        ("TPU v5", 4, True, True),
        ("TPU v5", 1, False, False),
        ("TPU7x", 4, True, True),
        ("TPU v5 lite", 4, False, True),
        ("TPU v6 lite", 4, False, False),
    ],
)
def test_auto_takes_them_where_xla_leaves_time_and_there_are_tokens(kind, rows, rms, layer):
    with tpus(kind=kind):
        for centered, taken in ((False, rms), (True, layer)):
            assert (tpu_norm.slower(call_of(B=rows, centered=centered)) is None) == taken
        with recorded_choices() as choices:
            found = lowered_kernels(jax.grad(loss, (0, 1, 2)), *call_of(B=rows)[:3])
    assert (list(choices["residual_rms_norm"]), len(found)) == ((["tpu_rows"], 2) if rms else (["xla_rows"], 0))


def test_lanes_are_programs_of_the_same_kernels():
    lanes = [jnp.stack([x] * 3) for x in call_of()[:3]]
    with tpus(kind="TPU v5"):
        found = lowered_kernels(jax.vmap(jax.grad(loss, (0, 1, 2))), *lanes)
    assert len(found) == 2 and all("tensor<3x2x512x256xf32>" in kernel for kernel in found)


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize(("channels", "centered"), [(1792, False), (200, True), (8192, True)])
def test_each_generation_compiles_them_and_copies_no_tokens(channels, centered, name):
    call = call_of(D=channels, T=2047, centered=centered)

    def both(*arrays):
        def run(*arrays):
            return tpu_norm.compute(NormCall(*arrays, *call[4:]))

        out, pullback = jax.vjp(run, *arrays)
        return out, pullback(out)

    text = compiled_text(name, both, *call[:4])
    names = set(re.findall(r"%(residual_norm_\w+?)[.\d]* = .* custom-call\(", text))
    assert names == {"residual_norm_forward", "residual_norm_gradients"}
    assert not re.search(rf"= \w+\[2,2047,{channels}\]\S* copy\(", text)
