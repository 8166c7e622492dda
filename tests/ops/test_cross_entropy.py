"""Cross-entropy of a linear layer: every form against the oracle."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hlo
from helpers.entropy import inputs_of, run

from based_jax import parallel
from based_jax.errors import UserError
from based_jax.labels import NO_LABEL
from based_jax.ops import cross_entropy_chunks
from based_jax.ops.cross_entropy import linear_cross_entropy
from based_jax.ops.dispatch import recorded_choices

XLA = "xla_logits", "xla_chunks"
compiled = jax.jit(linear_cross_entropy, static_argnames="impl")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Cut logits into tiles that are much smaller than they are, and divide neither rows nor vocabulary."""
    monkeypatch.setattr(cross_entropy_chunks, "BLOCK_ROWS", 16)
    monkeypatch.setattr(cross_entropy_chunks, "CHUNK_TOKENS", 300)


@pytest.fixture
def inputs(rng, normal):
    return inputs_of(rng, normal)


def _by(impl):
    return functools.partial(run, functools.partial(linear_cross_entropy, impl=impl))


@functools.cache
def _compiled_by(impl):
    return jax.jit(_by(impl))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_xla_is_the_oracle(inputs, close, dtype, scale):
    given = inputs(dtype=dtype, scale=scale)
    losses, correct, dhidden, dtable = _compiled_by("xla_logits")(*given)
    wanted = _compiled_by("oracle")(*given)
    assert losses.dtype == jnp.float32 and dhidden.dtype == dtype and dtable.dtype == jnp.float32
    assert np.isfinite(losses).all()
    close((losses, dhidden, dtable), (wanted[0], *wanted[2:]), dtype)
    np.testing.assert_array_equal(correct, wanted[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count, vocab, scale", [(37, 1000, 1.0), (37, 1000, 300.0), (16, 300, 1.0), (2, 7, 1.0)])
def test_tiles_are_the_oracle(inputs, close, dtype, count, vocab, scale):
    """Large logits are whole numbers: rounding would decide among tokens that are nearly alike."""
    hidden, table, *rest = inputs(count, vocab, dtype=dtype, scale=scale)
    if scale > 1:
        hidden, table = np.round(np.asarray(hidden) / 8) * 8, np.round(np.asarray(table) * 8) / 8
    given = hidden, table, *rest
    losses, correct, dhidden, dtable = _compiled_by("xla_chunks")(*given)
    wanted = _compiled_by("oracle")(*given)
    assert losses.dtype == jnp.float32 and dhidden.dtype == dtype and dtable.dtype == jnp.float32
    close((losses, dhidden, dtable), (wanted[0], *wanted[2:]), dtype)
    np.testing.assert_array_equal(correct, wanted[1])


@pytest.mark.parametrize("impl", XLA)
def test_lanes_are_the_runs_one_by_one(inputs, close, impl):
    runs = [inputs(count=20, vocab=320) for _ in range(3)]
    found = jax.jit(jax.vmap(_by(impl)))(*(np.stack(x) for x in zip(*runs, strict=True)))
    wanted = [np.stack(x) for x in zip(*(_compiled_by("oracle")(*run) for run in runs), strict=True)]
    close(found, wanted)


def test_the_oracle_is_the_definition(inputs):
    hidden, table, labels, _ = inputs()
    losses, correct = jax.device_get(compiled(hidden, table, labels, impl="oracle"))
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    for logit, label, loss, right in zip(logits, np.asarray(labels), losses, correct, strict=True):
        assert loss == pytest.approx(0 if label < 0 else np.log(np.exp(logit).sum()) - logit[label], rel=1e-5)
        assert right == (label == logit.argmax())


@pytest.mark.parametrize("impl", ["oracle", *XLA])
def test_a_label_with_the_largest_logit_is_correct(inputs, impl):
    hidden, table, *_ = inputs(count=8)
    labels = np.argmax(np.asarray(hidden) @ np.asarray(table).T, axis=1).astype(np.int32)
    labels[:2] = NO_LABEL, labels[1] - 1
    assert compiled(hidden, table, labels, impl=impl)[1].tolist() == [False, False, *[True] * 6]


@pytest.mark.parametrize("impl", XLA)
def test_a_tie_is_correct(impl):
    for label in (0, 1, 399):
        labels = np.int32([label])
        _, correct = compiled(np.ones((1, 4), np.float32), np.ones((400, 4), np.float32), labels, impl=impl)
        assert correct.all()


@pytest.mark.parametrize("impl", ["oracle", *XLA])
def test_labels_that_ask_for_nothing_give_nothing(inputs, impl):
    hidden, table, labels, gradients = inputs()
    losses, correct, *rest = _compiled_by(impl)(hidden, table, np.full_like(labels, -100), gradients)
    assert not np.any(correct)
    for x in (losses, *rest):
        assert not np.asarray(x).any()


def test_labels_of_8_bits_are_those_of_32(normal, close):
    """In a vocabulary that has more tokens than they have numbers."""
    hidden, table, labels = normal(3, 4), normal(300, 4), np.int8([1, 127, -100])
    results = (compiled(hidden, table, labels.astype(dtype)) for dtype in ("int8", "int32"))
    close(*results)


def test_leading_dimensions_and_rows_of_the_table_that_do_not_count(inputs, close):
    hidden, table, labels, gradients = inputs(count=24, vocab=50)
    hidden, table, labels, gradients = map(np.asarray, (hidden, table, labels, gradients))
    padded = np.concatenate([table, 9 * table[:6]])
    shaped = hidden.reshape(2, 3, 4, -1), padded, labels.reshape(2, 3, 4), gradients.reshape(2, 3, 4)
    call = functools.partial(linear_cross_entropy, vocab_size=50)
    losses, _, dhidden, dtable = jax.device_get(jax.jit(functools.partial(run, call))(*shaped))
    assert losses.shape == (2, 3, 4) and dhidden.shape == shaped[0].shape
    wanted = _compiled_by("oracle")(hidden, table, labels, gradients)
    found = losses.reshape(-1), dhidden.reshape(hidden.shape), dtable[:50]
    close(found, (wanted[0], *wanted[2:]))
    assert not dtable[50:].any()
    assert jax.eval_shape(linear_cross_entropy, hidden[0], table, labels[0])[0].shape == ()


def test_unknown_names_and_other_platforms_are_refused(inputs):
    given = inputs()[:3]
    with pytest.raises(UserError, match="linear_cross_entropy implementation"):
        linear_cross_entropy(*given, impl="xal")
    with pytest.raises(UserError, match="needs cuda"):
        linear_cross_entropy(*given, impl="hopper_tiles")


@pytest.mark.parametrize("impl", XLA)
def test_a_label_that_the_table_does_not_have_is_nan(inputs, impl):
    hidden, table, labels, _ = inputs(count=3, vocab=320)
    losses, correct = compiled(hidden, table, np.r_[np.int32(320), labels[1:]], impl=impl)
    assert np.isnan(losses).tolist() == [True, False, False] and not np.asarray(correct)[0]


def test_auto_keeps_logits_where_they_are_small():
    """What is timed in sweeps keeps its logits; what a language model has on a device would take 3.1 GiB."""
    small, large = ((16384, 128, 8192), (16384, 1024, 50264))
    chosen = []
    for count, dim, vocab in (small, large):
        shapes = (count, dim), (vocab, dim), (count,)
        given = [
            jax.ShapeDtypeStruct(x, dtype) for x, dtype in zip(shapes, ("bfloat16", "float32", "int32"), strict=True)
        ]
        with recorded_choices() as choices:
            jax.eval_shape(linear_cross_entropy, *given)
        chosen += choices["linear_cross_entropy"]
    assert chosen == ["xla_logits", "xla_chunks"]


@pytest.mark.parametrize("dim", [1024, 1792])
def test_temporaries_are_below_300_MiB_where_logits_are_3_GiB(monkeypatch, dim):
    """Beside the arguments, and the gradients of hidden and table, which are results."""
    monkeypatch.undo()
    shapes = ((8, 2048, dim), "bfloat16"), ((50264, dim), "float32"), ((8, 2048), "int32")

    def loss(hidden, table, labels):
        return linear_cross_entropy(hidden, table, labels)[0].sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*(jax.ShapeDtypeStruct(*x) for x in shapes)).compile()
    memory = compiled.memory_analysis()
    gradients = 2 * 8 * 2048 * dim + 4 * 50264 * dim
    assert memory.temp_size_in_bytes < 300 << 20
    assert gradients <= memory.output_size_in_bytes < gradients + (1 << 20)


MESH = {"data": 2, "fsdp": 2, "tensor": 2}
COUNT, VOCAB, DIM = 512, 1200, 48


def placed_inputs(inputs, mesh):
    """Return inputs on a mesh as training has them, and where they lie."""
    rows, table = jax.P(parallel.BATCH_AXES), jax.P("tensor", "fsdp")
    where = [jax.NamedSharding(mesh, spec) for spec in (rows, table, rows, rows)]
    given = inputs(COUNT, VOCAB, DIM)
    return given, [jax.device_put(x, to) for x, to in zip(given, where, strict=True)], where


def test_each_device_makes_its_own_logits(inputs, close):
    """An eighth of the products; of the table alone parts are gathered, and no logit leaves its device."""
    mesh = parallel.make_mesh(MESH)
    given, placed, where = placed_inputs(inputs, mesh)
    alone = jax.jit(_by("xla_chunks")).lower(*given).compile()
    with jax.set_mesh(mesh):
        out = where[0], where[0], where[0], where[1]
        shared = jax.jit(_by("xla_chunks"), in_shardings=where, out_shardings=out).lower(*given).compile()
    program = hlo.Program(shared.as_text())
    assert program.flops() == hlo.Program(alone.as_text()).flops() / 8
    exchanged = [program.exchanged((2, 2, 2), axis) for axis in range(3)]
    over_data, over_fsdp = ({(x.kind, x.shape) for x in found if math.prod(x.shape) > 1} for found in exchanged[:2])
    assert over_data == {("all-reduce", (VOCAB // 2, DIM // 2))}
    filled = VOCAB // 2 + 8
    assert {x for x in over_fsdp if x[0] != "all-to-all"} == {
        ("all-gather", (VOCAB // 2, DIM)),
        ("reduce-scatter", (filled // 2, DIM)),
    }
    assert [math.prod(shape) for kind, shape in over_fsdp if kind == "all-to-all"] == [filled * DIM // 4]
    assert {x.shape for x in exchanged[2] if x.kind == "all-gather"} == set()
    assert {x.shape for x in exchanged[2]} <= {(COUNT // 4,), (COUNT // 4, DIM), ()}
    close(shared(*placed), alone(*given))


def test_tiles_run_in_shard_map(inputs, close):
    given = inputs(32, 320)
    rows, mesh = jax.P(parallel.BATCH_AXES), parallel.make_mesh({"data": 2}, jax.devices()[:2])
    specs = (rows, jax.P(), rows, rows), (rows, rows, rows, jax.P())
    found = jax.jit(jax.shard_map(_by("xla_chunks"), mesh=mesh, in_specs=specs[0], out_specs=specs[1]))(*given)
    close(found, _compiled_by("oracle")(*given))
