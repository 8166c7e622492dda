"""What models are called."""

import pytest

from based_jax.nn import names

CONV = ("base_conv", {"kernel_size": 3})
BASED = ("taylor", {"num_heads": 1, "feature_dim": 16})


@pytest.mark.parametrize(
    ("layers", "name", "label"),
    [
        ([("mamba", {"d_state": 8})] * 2, "Mamba", "D 64, N 8"),
        ([("window", {"window": 32, "num_heads": 1}), BASED], "Sliding window + Based", "D 64, w 32, K 16"),
        ([("deltanet", {"num_heads": 2})], "DeltaNet", "D 64, 2 heads"),
        ([("window", {"window": 64, "num_heads": 1, "head_dim": None})], "Sliding window", "D 64, w 64"),
        ([CONV] * 2, "Convolution", "D 64, taps 3"),
        ([("linear", {"feature_map": "elu", "feature_dim": 8})], "Linear attention", "D 64, K 8, elu"),
    ],
)
def test_names(layers, name, label):
    assert (names.family(layers), names.label(layers, 64)) == (name, label)
