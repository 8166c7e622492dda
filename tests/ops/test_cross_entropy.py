"""Cross-entropy of a linear layer: every form against the oracle, and the Hopper kernels as far as a CPU can tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import gpus
from interpreted import replace_products
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from based_jax.errors import UserError
from based_jax.ops import cross_entropy
from based_jax.ops.cross_entropy import linear_cross_entropy
from pallas_kernels.hopper import cross_entropy as kernels

IGNORED = -1


@pytest.fixture
def inputs(rng, normal):
    """Return a source of hidden states, a table, labels of which a third is ignored, and gradients of the losses."""

    def draw(count=37, vocab=1000, dim=48, dtype="float32", scale=1.0):
        labels = np.where(rng.random(count) < 0.3, IGNORED, rng.integers(0, vocab, count))
        labels[:2] = IGNORED, vocab - 1
        return (
            normal(count, dim, dtype=dtype, scale=scale),
            normal(vocab, dim),
            jnp.asarray(labels, jnp.int32),
            normal(count),
        )

    return draw


def _run(call, hidden, table, labels, gradients):
    """Return losses, correct, and the gradients of hidden and table."""
    losses, pull, correct = jax.vjp(lambda h, w: call(h, w, labels), hidden, table, has_aux=True)
    return losses, correct, *pull(gradients)


def _by(impl):
    return functools.partial(_run, functools.partial(linear_cross_entropy, impl=impl))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_xla_is_the_oracle(inputs, close, dtype, scale):
    given = inputs(dtype=dtype, scale=scale)
    losses, correct, dhidden, dtable = jax.jit(_by("xla"))(*given)
    wanted = jax.jit(_by("oracle"))(*given)
    assert losses.dtype == jnp.float32 and dhidden.dtype == dtype and dtable.dtype == jnp.float32
    assert np.isfinite(losses).all()
    close((losses, dhidden, dtable), (wanted[0], *wanted[2:]), dtype)
    np.testing.assert_array_equal(correct, wanted[1])


def test_lanes_are_the_runs_one_by_one(inputs, close):
    runs = [inputs(count=9, vocab=20) for _ in range(3)]
    found = jax.vmap(_by("xla"))(*(jnp.stack(x) for x in zip(*runs, strict=True)))
    wanted = [jnp.stack(x) for x in zip(*(_by("oracle")(*run) for run in runs), strict=True)]
    close(found, wanted)


def test_the_oracle_is_the_definition(inputs):
    hidden, table, labels, _ = inputs()
    losses, correct = linear_cross_entropy(hidden, table, labels, impl="oracle")
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    for logit, label, loss, right in zip(logits, labels, losses, correct, strict=True):
        assert loss == pytest.approx(0 if label < 0 else np.log(np.exp(logit).sum()) - logit[label], rel=1e-5)
        assert right == (label == logit.argmax())


@pytest.mark.parametrize("impl", ["oracle", "xla"])
def test_a_label_with_the_largest_logit_is_correct(inputs, impl):
    hidden, table, *_ = inputs(count=8)
    best = jnp.argmax(hidden @ table.T, axis=1)
    labels = best.at[0].set(IGNORED).at[1].add(-1)
    assert linear_cross_entropy(hidden, table, labels, impl=impl)[1].tolist() == [False, False, *[True] * 6]


def test_a_tie_is_correct():
    for label in range(3):
        labels = jnp.array([label])
        _, correct = linear_cross_entropy(jnp.ones((1, 4)), jnp.ones((3, 4)), labels, impl="xla")
        assert correct.all()


@pytest.mark.parametrize("impl", ["oracle", "xla"])
def test_ignored_labels_give_nothing(inputs, impl):
    hidden, table, labels, gradients = inputs()
    losses, correct, *rest = _by(impl)(hidden, table, jnp.full_like(labels, -100), gradients)
    assert not correct.any()
    for x in (losses, *rest):
        assert not np.asarray(x).any()


def test_leading_dimensions_and_rows_of_the_table_that_do_not_count(inputs, close):
    hidden, table, labels, gradients = inputs(count=24, vocab=50)
    padded = jnp.concatenate([table, 9 * table[:6]])
    shaped = hidden.reshape(2, 3, 4, -1), padded, labels.reshape(2, 3, 4), gradients.reshape(2, 3, 4)
    call = functools.partial(linear_cross_entropy, vocab_size=50)
    losses, _, dhidden, dtable = _run(call, *shaped)
    assert losses.shape == (2, 3, 4) and dhidden.shape == shaped[0].shape
    wanted = _by("oracle")(hidden, table, labels, gradients)
    found = losses.reshape(-1), dhidden.reshape(hidden.shape), dtable[:50]
    close(found, (wanted[0], *wanted[2:]))
    assert not np.asarray(dtable[50:]).any()
    assert linear_cross_entropy(hidden[0], table, labels[0])[0].shape == ()


def test_unknown_names_and_other_platforms_are_refused(inputs):
    given = inputs()[:3]
    with pytest.raises(UserError, match="linear_cross_entropy implementation"):
        linear_cross_entropy(*given, impl="xal")
    with pytest.raises(UserError, match="needs cuda"):
        linear_cross_entropy(*given, impl="hopper")


def _arrays(count=1024, vocab=8192, dim=128, dtype=jnp.bfloat16, lanes=()):
    hidden, table = jnp.zeros((*lanes, count, dim), dtype), jnp.zeros((*lanes, vocab, dim))
    return hidden, table, jnp.zeros((*lanes, count), jnp.int32)


@pytest.mark.parametrize(
    "arrays, words",
    [
        (_arrays(dtype=jnp.float32), "bfloat16, and is float32"),
        (_arrays(dim=264), "1 to 256 channels, and has 264"),
        (_arrays(count=0), "a label"),
        (_arrays(vocab=0), "a token"),
    ],
)
def test_refusals_name_the_value(arrays, words):
    with gpus():
        assert words in cross_entropy._supports(*arrays)
        assert cross_entropy._supports(*_arrays(dim=256)) is None
    with gpus("NVIDIA A100-SXM4-80GB"):
        assert "A100" in cross_entropy._supports(*_arrays())
    arrays = _arrays()
    with gpus(shape=(2,), axes=AxisType.Explicit):
        assert "shard_map" in cross_entropy._supports(*arrays)


@pytest.mark.parametrize(
    "rows, length, start, pieces",
    [
        (16384, 8192, 2, 3),
        (65536, 8192, 2, 3),
        (65536, 8192, 6, 1),
        (1024, 8192, 2, 22),
        (1, 8192, 2, 64),
        (8192, 1, 2, 1),
    ],
)
def test_pieces_fill_the_chip(rows, length, start, pieces):
    assert cross_entropy.number_of_pieces(rows, length, kernels.Tiling(3, 128, 4), start) == pieces


def _gradients(hidden, table, labels):
    def loss(hidden, table):
        return linear_cross_entropy(hidden, table, labels, vocab_size=table.shape[0] - 7)[0].sum()

    return jax.grad(loss, argnums=(0, 1))(hidden, table)


def _lowered(call, arrays):
    return jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("count, dim", [(37, 48), (200, 256)])
def test_lowers_for_an_h100(count, dim):
    arrays = _arrays(count, 1000, dim)
    with gpus():
        text = _lowered(_gradients, arrays)
    assert all(f"cross_entropy_{name}" in text for name in ("forward", "hidden", "table"))


def test_lowers_under_vmap():
    hidden, table, labels = _arrays(256, 1000, 64, lanes=(3,))
    with gpus():
        assert "cross_entropy_table" in _lowered(jax.vmap(_gradients, (0, 0, None)), (hidden, table, labels[0]))


def test_lowers_under_shard_map_over_the_batch():
    arrays = _arrays(512, 1000, 64)
    rows = PartitionSpec("data")
    with gpus(shape=(2,)):
        call = jax.shard_map(_gradients, in_specs=(rows, PartitionSpec(), rows), out_specs=(rows, PartitionSpec()))
        assert "cross_entropy_table" in _lowered(call, arrays)


@pytest.mark.parametrize("count, vocab, dim, scale, lanes", [(37, 1000, 48, 1.0, 1), (200, 130, 128, 100.0, 2)])
def test_interpreted_kernels_are_the_oracle(inputs, close, monkeypatch, count, vocab, dim, scale, lanes):
    monkeypatch.setattr(cross_entropy, "number_of_pieces", lambda *args: 2)
    replace_products(monkeypatch)
    given = jax.tree.map(lambda *x: jnp.stack(x), *(inputs(count, vocab, dim, "bfloat16", scale) for _ in range(lanes)))
    wanted = jax.jit(jax.vmap(_by("oracle")))(*given)

    def run(*given):
        return _run(cross_entropy._hopper, *given)

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.vmap(run)(*given) if lanes > 1 else run(*(x[0] for x in given))
    assert not get_races().races_found
    found = [x.reshape(y.shape) for x, y in zip(found, wanted, strict=True)]
    close(found[0], wanted[0], tolerance=1e-4)
    close(found[2:], wanted[2:], "bfloat16")
    np.testing.assert_array_equal(found[1], wanted[1])
