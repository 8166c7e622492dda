"""The Hopper kernel of few tokens' product as far as a CPU can tell: which it takes, gradients, the interpreter."""

import jax
import jax.numpy as jnp
import pytest
from helpers.devices import gpus
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.ops.hopper import few_tokens_product


def _zeros(tokens=128, rows=1792, columns=7168, dtype="bfloat16"):
    return jnp.zeros((tokens, rows), dtype), jnp.zeros((rows, columns), dtype)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float32"}, "must be bfloat16, and is float32"),
        ({"tokens": 129}, "1 to 128 tokens, and are 129"),
        ({"columns": 96}, "1792 by 96 cannot be cut for 132 multiprocessors"),
    ],
)
def test_refusals_name_the_value(options, words):
    with gpus():
        assert words in (few_tokens_product.supports(*_zeros(**options)) or "")
        assert few_tokens_product.supports(*_zeros()) is None


def test_a_plan_has_no_more_blocks_than_the_gpu_runs_at_once():
    from pallas_kernels.hopper.few_tokens_product import Plan

    for rows, columns in ((1792, 7168), (3584, 1792), (2048, 11264), (5632, 2048), (1792, 256)):
        plan = Plan.of(rows, columns, 132)
        assert plan is not None and plan.steps * plan.pieces * 64 == rows
        assert 60 <= columns // plan.width * plan.pieces <= 132 or plan.steps == 2


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernel in Pallas' interpreter, which looks for races."""
    from pallas_kernels.hopper import few_tokens_product as kernels

    def products(body, *shapes):
        return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    monkeypatch.setattr(kernels, "products", products)
    monkeypatch.setattr(kernels, "MAX_STEPS_AHEAD", 2)
    with gpus(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(3, 128, 64), pytest.param(100, 256, 192, marks=pytest.mark.long)]
)
def test_it_equals_the_product(tokens, rows, columns, normal, close, interpreted):
    x, matrix = normal(tokens, rows, dtype="bfloat16"), normal(rows, columns, dtype="bfloat16")
    dy = normal(tokens, columns)

    def ours(x, matrix):
        return jnp.sum(few_tokens_product.sums(x, matrix).sum(axis=0) * dy)

    def right(x, matrix):
        return jnp.sum((x.astype(jnp.float32) @ matrix.astype(jnp.float32)) * dy)

    for found, wanted in zip(*(jax.value_and_grad(f, (0, 1))(x, matrix) for f in (ours, right)), strict=True):
        close(found, wanted, "bfloat16")
    assert not get_races().races_found
