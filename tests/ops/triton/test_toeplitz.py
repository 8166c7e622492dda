"""Convolutions' Triton kernels as far as a CPU can tell: who takes them, the interpreter, and lowering for an H100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import triton_interpreter
from helpers.cases import parametrize_some
from helpers.devices import H100, gpus
from helpers.documents import numbered

from based_jax.ops import conv, diagonal_ssm, long_conv, segments
from based_jax.ops.calls import DiagonalSSMCall, LongConvCall, ShortConvCall
from based_jax.ops.dispatch import choose
from based_jax.ops.triton import toeplitz


def long_call(T=2048, dtype=jnp.bfloat16, B=2, D=4):
    u = jnp.zeros((B, T, D), dtype)
    return LongConvCall(u, jnp.zeros((T, D)), jnp.ones((B, T), jnp.int32))


def short_call(taps, dilation=1):
    return ShortConvCall(jnp.zeros((2, 256, 4), jnp.bfloat16), jnp.zeros((taps, 4)), dilation=dilation)


@pytest.mark.parametrize(
    ("module", "operation", "call", "kind", "taken"),
    [
        (long_conv, "long_conv", long_call(), H100, "triton_tiles"),
        (long_conv, "long_conv", long_call(T=8193), H100, "xla_fft"),
        (long_conv, "long_conv", long_call(dtype=jnp.float32), H100, "xla_fft"),
        (long_conv, "long_conv", long_call(), "NVIDIA A100-SXM4-80GB", "triton_tiles"),
        (long_conv, "long_conv", long_call(), "gfx942", "xla_fft"),
        (conv, "short_conv", short_call(64), H100, "triton_tiles"),
        (conv, "short_conv", short_call(9, dilation=1024), H100, "xla_toeplitz"),
        (conv, "short_conv", short_call(conv.MAX_UNROLLED_TAPS), H100, "xla_taps"),
    ],
)
def test_who_takes_them(module, operation, call, kind, taken):
    with gpus(kind):
        assert choose(operation, module.IMPLEMENTATIONS, "auto", call) == taken


def test_refusals_name_the_value():
    assert "must be bfloat16, and are float32" in toeplitz.supports(long_call(dtype=jnp.float32).u)
    assert "no dimension may be empty, and they are (0, 2048, 4)" in toeplitz.supports(long_call(B=0).u)


def documents(packed_ids, T):
    """Return ids (3, T) of many documents, and of padding before one and behind one."""
    return np.asarray(packed_ids(T))[1:4]


# (B, T, L, D): blocks of several programs; filters that end within a block and behind it; less than a block.
CASES = [(45, 130, 130, 1), (3, 200, 64, 1), (3, 257, 66, 2), (3, 5, 5, 3)]


@parametrize_some("B, T, L, D", CASES, CASES[:1])
@parametrize_some("packed", [True, False], [True])
def test_they_equal_the_oracle(B, T, L, D, packed, normal, packed_ids, out_and_grads, close, monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    u, cotangent = normal(B, T, D, dtype="bfloat16"), normal(B, T, D, dtype="bfloat16")
    kernel = np.asarray(normal(L, D, dtype="bfloat16"), np.float32)
    ids = jax.device_put(np.resize(documents(packed_ids, T), (B, T))) if packed else None
    compute = segments.without_padding(lambda call: toeplitz.convolve(*call), "u")

    def tiles(u, kernel):
        return compute(LongConvCall(u, kernel, None if ids is None else segments.numbered(ids)))

    def oracle(u, kernel):
        whole = jnp.pad(kernel, ((0, T - L), (0, 0)))
        return long_conv.long_conv(u, whole, segment_ids=ids, impl="oracle")

    (y, grads), expected = (out_and_grads(call, (u, kernel), cotangent) for call in (tiles, oracle))
    close((y, grads), expected, "bfloat16")
    close(grads[1], expected[1][1], tolerance=1e-5)


def test_lanes_have_their_own_documents_and_filters(normal, close, monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    u, kernel = normal(2, 2, 70, 2, dtype="bfloat16"), normal(2, 70, 2)
    numbers = np.int32(1 + (np.arange(70) >= np.asarray([[[9], [66]], [[40], [2]]])))

    def pulled_back(convolve):
        return jax.jit(jax.vmap(lambda *x: jax.vjp(lambda u, h: convolve(u, h, x[2]), *x[:2])[1](x[0])))

    def oracle(u, kernel, numbers):
        return long_conv.long_conv(u, kernel, segment_ids=numbers, impl="oracle")

    found, expected = (pulled_back(f)(u, kernel, numbers) for f in (toeplitz.convolve, oracle))
    close(found, expected, "bfloat16")


def results(module, call):
    """Return what an operation's entry of the kernels makes of a call, and what the oracle does."""
    entries = [module.IMPLEMENTATIONS[name].for_documents(unbroken=False) for name in ("triton_tiles", "oracle")]
    return jax.jit(lambda: [compute(call) for compute in entries])()


def test_short_convolutions_equal_the_oracle(normal, packed_ids, close, monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    x, state, kernel = normal(3, 70, 2, dtype="bfloat16"), normal(3, 27, 2, dtype="bfloat16"), normal(14, 2)
    ids = jax.device_put(numbered(documents(packed_ids, 70)))
    close(*results(conv, ShortConvCall(x, kernel, normal(2), state, ids, silu=True, dilation=2)), "bfloat16")


def test_diagonal_state_spaces_equal_the_oracle(normal, packed_ids, close, monkeypatch):
    triton_interpreter.interpret(monkeypatch)
    real, imaginary, *parts = (np.asarray(normal(2, 3)) for _ in range(6))
    log_a = -np.float32(0.05) * np.abs(real) - np.float32(0.01) + 1j * imaginary
    b, c = parts[0] + 1j * parts[1], parts[2] + 1j * parts[3]
    u, state = normal(3, 70, 2, 2, dtype="bfloat16"), normal(3, 2, 2, 3, 2)
    log_a, b, c, ids = jax.device_put((log_a, b, c, numbered(documents(packed_ids, 70))))
    close(*results(diagonal_ssm, DiagonalSSMCall(u, log_a, b, c, state, ids)), "bfloat16")


def test_each_device_has_its_rows_and_channels():
    call = long_call(T=256, B=4, D=8)

    def loss(u, kernel, ids):
        y = long_conv.long_conv(u, kernel, segment_ids=ids, impl="triton_tiles")
        return jnp.sum(y.astype(jnp.float32) ** 2)

    with gpus(shape=(2, 2), names=("data", "tensor")):
        text = jax.jit(jax.grad(loss, (0, 1))).trace(*call).lower(lowering_platforms=("cuda",)).as_text()
    kernels = [line for line in text.splitlines() if "@triton_kernel_call" in line]
    assert len(kernels) == 4 and all("tensor<4x2x256xbf16>" in line for line in kernels)
    assert [sum(f"tensor<4x{tiles}x128xf32>" in line for line in kernels) for tiles in (1, 4)] == [1, 1]  # of filters
