"""Cross-entropy of a linear layer: every form against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.entropy import inputs_of, run

from based_jax.errors import UserError
from based_jax.labels import NO_LABEL
from based_jax.ops.cross_entropy import linear_cross_entropy


@pytest.fixture
def inputs(rng, normal):
    return inputs_of(rng, normal)


def _by(impl):
    return functools.partial(run, functools.partial(linear_cross_entropy, impl=impl))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_xla_is_the_oracle(inputs, close, dtype, scale):
    given = inputs(dtype=dtype, scale=scale)
    losses, correct, dhidden, dtable = jax.jit(_by("xla_logits"))(*given)
    wanted = jax.jit(_by("oracle"))(*given)
    assert losses.dtype == jnp.float32 and dhidden.dtype == dtype and dtable.dtype == jnp.float32
    assert np.isfinite(losses).all()
    close((losses, dhidden, dtable), (wanted[0], *wanted[2:]), dtype)
    np.testing.assert_array_equal(correct, wanted[1])


def test_lanes_are_the_runs_one_by_one(inputs, close):
    runs = [inputs(count=9, vocab=20) for _ in range(3)]
    found = jax.vmap(_by("xla_logits"))(*(jnp.stack(x) for x in zip(*runs, strict=True)))
    wanted = [jnp.stack(x) for x in zip(*(_by("oracle")(*run) for run in runs), strict=True)]
    close(found, wanted)


def test_the_oracle_is_the_definition(inputs):
    hidden, table, labels, _ = inputs()
    losses, correct = linear_cross_entropy(hidden, table, labels, impl="oracle")
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    for logit, label, loss, right in zip(logits, labels, losses, correct, strict=True):
        assert loss == pytest.approx(0 if label < 0 else np.log(np.exp(logit).sum()) - logit[label], rel=1e-5)
        assert right == (label == logit.argmax())


@pytest.mark.parametrize("impl", ["oracle", "xla_logits"])
def test_a_label_with_the_largest_logit_is_correct(inputs, impl):
    hidden, table, *_ = inputs(count=8)
    best = jnp.argmax(hidden @ table.T, axis=1)
    labels = best.at[0].set(NO_LABEL).at[1].add(-1)
    assert linear_cross_entropy(hidden, table, labels, impl=impl)[1].tolist() == [False, False, *[True] * 6]


def test_a_tie_is_correct():
    for label in range(3):
        labels = jnp.array([label])
        _, correct = linear_cross_entropy(jnp.ones((1, 4)), jnp.ones((3, 4)), labels, impl="xla_logits")
        assert correct.all()


@pytest.mark.parametrize("impl", ["oracle", "xla_logits"])
def test_labels_that_ask_for_nothing_give_nothing(inputs, impl):
    hidden, table, labels, gradients = inputs()
    losses, correct, *rest = _by(impl)(hidden, table, jnp.full_like(labels, -100), gradients)
    assert not correct.any()
    for x in (losses, *rest):
        assert not np.asarray(x).any()


def test_labels_of_8_bits_are_those_of_32(normal, close):
    """In a vocabulary that has more tokens than they have numbers."""
    hidden, table, labels = normal(3, 4), normal(300, 4), np.int8([1, 127, -100])
    results = (linear_cross_entropy(hidden, table, labels.astype(dtype)) for dtype in ("int8", "int32"))
    close(*results)


def test_leading_dimensions_and_rows_of_the_table_that_do_not_count(inputs, close):
    hidden, table, labels, gradients = inputs(count=24, vocab=50)
    padded = jnp.concatenate([table, 9 * table[:6]])
    shaped = hidden.reshape(2, 3, 4, -1), padded, labels.reshape(2, 3, 4), gradients.reshape(2, 3, 4)
    call = functools.partial(linear_cross_entropy, vocab_size=50)
    losses, _, dhidden, dtable = run(call, *shaped)
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
        linear_cross_entropy(*given, impl="hopper_tiles")
