import jax
import jax.numpy as jnp
import numpy as np

from based_jax.ops.token_shift import token_shift


def test_the_token_before_in_the_same_document(normal):
    x, state = np.asarray(normal(4, 6, 2)), np.asarray(normal(4, 2))
    ids = np.int32([[1] * 6, [0, 0, 3, 3, 1, 1], [2, 2, 0, 0, 5, 0], [0] * 6])
    shifted, after = jax.jit(lambda x, state, ids: token_shift(x, state=state, segment_ids=ids))(x, state, ids)
    zero = np.zeros(2)
    expected = [
        [state[0], *x[0, :5]],
        [zero, zero, state[1], x[1, 2], zero, x[1, 4]],
        [state[2], x[2, 0], zero, zero, zero, zero],
        [zero] * 6,
    ]
    np.testing.assert_array_equal(shifted, np.asarray(expected))
    np.testing.assert_array_equal(after, np.stack([x[0, 5], x[1, 5], x[2, 4], state[3]]))


def test_without_a_state_the_first_token_has_none_before(normal):
    x = np.asarray(normal(2, 3, 4, dtype="bfloat16"))
    shifted = np.asarray(jax.jit(token_shift)(x)[0])
    assert shifted.dtype == jnp.bfloat16
    np.testing.assert_array_equal(shifted[:, 0], 0)
    np.testing.assert_array_equal(shifted[:, 1:], x[:, :2])
