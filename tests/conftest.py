"""What all tests share: eight fake devices, strict shapes, inputs of their own, and the tolerances."""

import functools
import gc
import os
import signal
import zlib

from helpers import environments

os.environ.update(environments.of_the_suite())
os.environ["BASED_JAX_COMPILED"] = "none"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cuda_plugin
from helpers.shapes import check_shapes

from based_jax import placement

# Some shells ignore Ctrl-C for what runs in their background, which tests of it would inherit, and their processes.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes many objects and little garbage: Python would look for it a hundred times as often.
gc.set_threshold(50_000, 20, 50)

jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

cuda_plugin.stand_in()

# So small are most parameters of the models here; what is small beside these is divided by the same ratio.
placement.SMALL_BYTES //= 256

# nn.cache is left out: its pytree also holds stacked arrays and abstract leaves, which its annotations do not mean.
MODULES_CHECKED = "block", "layers", "lm", "mixers", "mlps", "multihead", "projections"
SHAPES_CHECKED = ["based_jax.ops", *(f"based_jax.nn.{name}" for name in MODULES_CHECKED)]
check_shapes(SHAPES_CHECKED)

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture
def rng(request):
    """Return a generator with a seed of the test's own."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def normal(rng):
    """Return a source of Gaussian arrays."""

    def draw(*shape, dtype="float32", scale=1.0):
        return jax.device_put(np.asarray(scale * rng.standard_normal(shape), jnp.dtype(dtype)))

    return draw


@pytest.fixture
def packed_ids(rng):
    """Return a source of (6, T) ids: a document; documents down to one token; padding left, right, between, only."""

    def draw(T):
        begins = rng.random(T) < 0.2
        begins[:2] = True
        packed, position = 1 + np.cumsum(begins) % 3, np.arange(T)  # ids return
        between = np.where(packed == 3, 0, packed)
        left, right = position >= T // 3, packed * (position < T - T // 3)
        return jax.device_put(np.asarray([np.ones(T), packed, left, right, between, np.zeros(T)], np.int32))

    return draw


@pytest.fixture
def close():
    """Return an assertion that two trees agree relative to the largest entry of each expected leaf.

    `floor` is the error that is forgiven whatever that entry, where it is a sum that cancels.
    """

    def check(actual, expected, dtype="float32", *, tolerance=None, floor=1e-6, what=""):
        tolerance = tolerance or TOLERANCE[dtype]
        actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
            assert a.shape == e.shape, f"{what} leaf {i}"
            error, scale = np.abs(a - e).max(initial=0), np.abs(e).max(initial=0)
            assert error <= tolerance * scale + floor, f"{what} leaf {i}: off by {error:.2e}, largest {scale:.2e}"

    return check


@pytest.fixture
def out_and_grads():
    """Return a function of (call, arguments, cotangents) that compiles a call with its pullback and runs both."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(call, args, cotangents):
        out, pullback = jax.vjp(call, *args)
        return out, pullback(cotangents)

    return run


@pytest.fixture
def as_a_user(monkeypatch):
    """Processes that the test starts are told nothing of how the suite compiles: for what runs for minutes.

    What runs for seconds compiles longer than that, and has the numbers of this process if it is told the same.
    """
    own = environments.of_a_user()
    for variable in os.environ.keys() - own.keys():
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XLA_FLAGS", own["XLA_FLAGS"])
