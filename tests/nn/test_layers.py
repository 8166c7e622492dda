import jax.numpy as jnp
import numpy as np
import pytest

from based_jax.nn.layers import rotary


@pytest.mark.parametrize(("dim", "rotated"), [(8, 8), (4, 4), (5, 6), (0, 0)])
def test_rotary_turns_pairs_as_complex_numbers(dim, rotated, normal, close):
    """An odd dim of 5 has frequencies 0, 2/5 and 4/5, so 6 components turn; the rest pass."""
    x, positions = normal(2, 7, 3, 8), jnp.arange(3, 10)
    y = rotary(x, positions, dim, 100.0)
    half = rotated // 2
    pairs = np.asarray(x[..., :half]) + 1j * np.asarray(x[..., half:rotated])
    turns = np.exp(1j * np.asarray(positions)[:, None] * 100.0 ** (-np.arange(0, dim, 2) / max(dim, 1)))
    turned = pairs * turns[None, :, None, :]
    close(y, np.concatenate([turned.real, turned.imag, x[..., rotated:]], axis=-1))
