"""The gated convolution's TPU kernels: refusals, values in the interpreter, on one device on eight, and compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from helpers.cases import parametrize_some
from helpers.devices import tpus
from helpers.tpu_compiler import SLICES, compiled_text, lowered_kernels, needs_libtpu
from helpers.tpu_interpreter import interpreted

from based_jax import parallel
from based_jax.ops import gated_conv, segments
from based_jax.ops.calls import GatedConvCall
from based_jax.ops.dispatch import recorded_choices
from based_jax.ops.gated_conv import CUT, IMPLEMENTATIONS, gated_short_conv
from based_jax.ops.tpu import gated_short_conv as tpu_gated_short_conv
from pallas_kernels.tpu import gated_short_conv as kernels


def call_of(T=512, D=256, taps=3, B=2, dtype=jnp.bfloat16):
    bias, ids = jnp.zeros(2 * D), jnp.ones((B, T), jnp.int32)
    return GatedConvCall(jnp.zeros((B, T, 2 * D), dtype), jnp.zeros((taps, D)), bias, None, ids)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (call_of(dtype=jnp.float16), "bfloat16 or float32, and is float16"),
        (call_of(D=192), "a multiple of 128 up to 8192, and are 192"),
        (call_of(taps=9), "at most 8 taps, and are 9"),
        (call_of(B=0), "no dimension may be empty, and x is (0, 512, 512)"),
    ],
)
def test_refusals_name_the_value(call, words):
    assert words in tpu_gated_short_conv.supports(call)
    assert tpu_gated_short_conv.supports(call_of(T=1, taps=8, dtype=jnp.float32)) is None


@pytest.mark.parametrize(
    ("time", "channels", "tokens"), [(1, 128, 128), (2048, 1024, 512), (2048, 1792, 256), (600, 1024, 128)]
)
def test_a_program_has_the_tokens_that_fill_up_least_of_those_that_fit(time, channels, tokens):
    assert kernels.block_tokens(time, channels, 2) == tokens


def of_kernels(call):
    """Return y by the kernels, of documents with padding anywhere."""
    chosen = IMPLEMENTATIONS["tpu_taps"]
    if call.segment_ids is not None:
        call = call._replace(segment_ids=segments.numbered(call.segment_ids))
    return segments.without_padding(chosen.compute, *chosen.by_place)(call)


# (T, D, taps, dtype, packed, bias, state): one part of a block, several and several blocks, not filled; several groups
# of channels; documents shorter than the taps and padding anywhere; a state; a single tap.
CASES = [
    (20, 128, 3, "bfloat16", True, True, True),
    (90, 128, 3, "bfloat16", True, False, True),
    (260, 128, 4, "float32", True, True, False),
    (130, 256, 2, "float32", False, False, True),
    (64, 128, 8, "float32", True, False, False),
    (20, 128, 1, "float32", False, True, True),
]


@parametrize_some("T, D, taps, dtype, packed, bias, state", CASES, CASES[:1])
def test_they_equal_the_oracle(T, D, taps, dtype, packed, bias, state, normal, packed_ids, out_and_grads, close):
    """Forward and gradients; nothing races, and what nothing has written is NaN."""
    x, cotangent, kernel = normal(2, T, 2 * D, dtype=dtype), normal(2, T, D, dtype=dtype), normal(taps, D)
    ids = packed_ids(T)[1:5:3] if packed else None  # many documents, and padding between
    given = x, kernel, normal(2 * D) if bias else None, normal(2, taps, D, dtype=dtype) if state else None

    numbers = None if ids is None else segments.numbered(ids)
    right = segments.without_padding(IMPLEMENTATIONS["oracle"].compute, "x")
    with interpreted():
        found = out_and_grads(lambda *given: of_kernels(GatedConvCall(*given, ids)), given, cotangent)
        found = jax.block_until_ready(found)
    close(found, out_and_grads(lambda *given: right(GatedConvCall(*given, numbers)), given, cotangent), dtype)


@pytest.mark.long
def test_eight_devices_equal_one(normal, packed_ids, out_and_grads, close):
    """Rows over four devices, and time over two: a piece gets the inputs before it as its state."""
    x, cotangent, kernel, bias = normal(4, 40, 256), normal(4, 40, 128), normal(3, 128), normal(256)
    ids = segments.numbered(packed_ids(40)[:4])

    def own(x, kernel, bias):
        run = IMPLEMENTATIONS["tpu_taps"].compute
        return CUT(lambda call, **_: run(call), GatedConvCall(x, kernel, bias, None, ids))

    mesh = parallel.make_mesh({"data": 4, "sequence": 2}, jax.devices())
    with interpreted(), jax.set_mesh(mesh):
        found = jax.device_get(out_and_grads(own, (x, kernel, bias), cotangent))

    def oracle(x, kernel, bias):
        return gated_short_conv(x, kernel, bias=bias, segment_ids=ids, impl="oracle")[0]

    close(found, out_and_grads(oracle, (x, kernel, bias), cotangent))


def loss(x, kernel, bias, ids):
    return jnp.sum(gated_conv.gated_short_conv(x, kernel, bias=bias, segment_ids=ids)[0].astype(jnp.float32) ** 2)


@pytest.mark.parametrize(
    ("shape", "names", "local"),
    [((1,), ("data",), "4x512x512"), ((2, 2), ("data", "sequence"), "2x256x512")],
    ids=str,
)
def test_auto_lowers_for_tpus_each_with_its_rows_and_time(shape, names, local):
    call = call_of(B=4)
    with tpus(shape=shape, names=names), recorded_choices() as choices:
        found = lowered_kernels(jax.value_and_grad(loss, (0, 1, 2)), *call[:3], call.segment_ids)
    assert (list(choices["gated_short_conv"]), len(found)) == (["tpu_taps"], 2)
    assert all(f"tensor<{local}xbf16>" in kernel for kernel in found)


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("name", SLICES)
def test_each_generation_compiles_them_and_copies_no_tokens(name):
    call = jax.eval_shape(functools.partial(call_of, T=2048, D=1792))
    text = compiled_text(name, jax.value_and_grad(loss, (0, 1, 2)), *call[:3], call.segment_ids)
    names = set(re.findall(r"%(gated_short_conv_\w+?)[.\d]* = .* custom-call\(", text))
    assert names == {"gated_short_conv_forward", "gated_short_conv_gradients"}
    assert not re.search(r"= bf16\[2,2048,3584\]\S* copy\(", text)
