import jax.numpy as jnp
import numpy as np

from based_jax.ops import segments


def test_positions_count_within_documents_and_continue():
    ids = jnp.asarray([[0, 0, 3, 3, 0, 1], [2, 2, 2, 7, 7, 0], [0] * 6, [5] * 6], jnp.int32)
    place, after = segments.positions(ids, jnp.asarray([4, 10, 9, 0]), ids.shape[1])
    known = np.asarray(ids) != 0
    expected = np.asarray([[0, 0, 4, 5, 0, 0], [10, 11, 12, 0, 1, 0], [0] * 6, range(6)])
    np.testing.assert_array_equal(np.where(known, place, 0), np.where(known, expected, 0))
    np.testing.assert_array_equal(after, [1, 2, 9, 6])
