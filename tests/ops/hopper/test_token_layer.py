"""The Hopper kernel of half a layer of a token as far as a CPU can tell: plans, lowering, the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.devices import gpus
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import token_layer as kernels
from pallas_kernels.hopper import token_strips

OPTIONS = {"eps": 1e-5, "multiprocessors": 132}


def test_blocks_of_a_plan_are_all_at_work_at_once():
    plans = [kernels.Plan.of(*sizes, 132) for sizes in ((1792, 3584), (1024, 2048), (2048, 4096))]
    assert [plan.pieces for plan in plans] == [4, 8, 4]
    assert all(plan.grid <= 132 for plan in plans)
    assert kernels.Plan.of(2048, 5632, 132) is None and kernels.Plan.of(1680, 4608, 132) is None


def arguments(width, hidden, normal):
    """Return the arguments of a convolution by name."""
    shapes = {"r": (width,), "y": (2, width), "scale": (width,), "bias": (2 * hidden,), "kernel": (3, hidden)}
    narrow = {"first": (width, 2 * hidden), "state": (3, hidden), "second": (hidden, width)}
    wide = {name: normal(*shape) for name, shape in (shapes | {"last_bias": (width,)}).items()}
    return wide | {name: (0.1 * normal(*shape)).astype(jnp.bfloat16) for name, shape in narrow.items()}


def mlp(a):
    given = (a[name] for name in ("r", "y", "scale", "first", "second"))
    return kernels.gated_mlp(*given, jnp.zeros(kernels.MARKS, jnp.int32), **OPTIONS)


def conv(a):
    names = "r", "y", "scale", "first", "bias", "kernel", "state", "second", "last_bias"
    return kernels.gated_conv(*(a[name] for name in names), jnp.zeros(kernels.MARKS, jnp.int32), **OPTIONS)


@pytest.mark.parametrize(
    ("half", "width", "hidden"), [(mlp, 256, 1408), pytest.param(conv, 256, 128, marks=pytest.mark.long)]
)
def test_lowers_for_an_h100(half, width, hidden, normal):
    """Of chunks that are no multiple of each other, too."""
    with gpus():
        text = jax.jit(half).trace(arguments(width, hidden, normal)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernel in Pallas' interpreter, which takes a block after the other: it runs twice.

    A second run finds what blocks exchanged in the first one.
    """
    real = plgpu.kernel

    def twice(body, *, out_type, **options):
        def run(*given):
            again = [jax.new_ref(x[...]) if hasattr(jax.typeof(x), "inner_aval") else x for x in given]
            exchanged = jax.new_ref(real(body, out_type=out_type, **options)(*again)[1])

            def second(*refs):
                inputs, h, (total, *rest) = refs[: len(given)], refs[len(given)], refs[len(given) + 1 :]
                return body(*inputs, total, h, *rest)

            total, *rest = real(second, out_type=[out_type[0], *out_type[2:]], **options)(*given, exchanged)
            return total, None, *rest

        return run

    monkeypatch.setattr(plgpu, "kernel", twice)
    monkeypatch.setattr(plgpu, "load", lambda ref, **_: ref[...])
    for name in ("_signal", "_await", "keep_plain"):
        monkeypatch.setattr(kernels, name, lambda *_: None)
    monkeypatch.setattr(kernels, "load_global", lambda ref, _: ref[...])
    monkeypatch.setattr(token_strips, "load_shared", lambda ref, _: ref[...].astype(jnp.float32))
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@pytest.mark.long
@pytest.mark.parametrize("half", [mlp, conv])
def test_a_half_layer_is_its_definition(half, normal, interpreted):
    a = arguments(256, 128, normal)
    total, sums, marks, *states = half(a)
    x = {name: np.asarray(value, np.float64) for name, value in a.items()}
    t = x["r"] + x["y"].sum(axis=0)
    product = t / np.sqrt(np.mean(t * t) + 1e-5) * x["scale"] @ x["first"]
    if half is mlp:
        u, g = np.split(product, 2)
        h, bias = u * g / (1 + np.exp(-g)), 0
    else:
        u, g = np.split(product + x["bias"], 2)
        inputs = np.concatenate([x["state"][1:], u[None]])
        convolved = (x["kernel"] * inputs).sum(axis=0)
        h, bias = convolved / (1 + np.exp(-convolved)) * g, x["last_bias"]
        np.testing.assert_allclose(np.asarray(states[0], np.float64), inputs, rtol=1e-2, atol=1e-2)
    expected = h @ x["second"] + bias
    np.testing.assert_allclose(total, t, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(sums).sum(axis=0), expected, rtol=0, atol=1e-2 * np.abs(expected).max())
    assert not marks.any()
