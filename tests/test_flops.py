import pytest
from flax import nnx

from based_jax import flops
from based_jax.nn.lm import LM, LMConfig


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5e", 197e12),
    ],
)
def test_a_device_has_the_peak_of_the_longest_name_it_starts_with(kind, peak):
    assert flops.peak_flops(kind) == peak


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H10", "", "an NVIDIA H200"])
def test_an_unknown_device_has_no_peak_and_no_utilisation(kind):
    assert flops.peak_flops(kind) is None
    assert flops.mfu(1e6, 1e6, 1, kind) is None


def test_utilisation_of_a_small_model_by_hand():
    config = LMConfig(layers=(("attention", {"num_heads": 2}),), d_model=16, vocab_size=60, mlp_dim=24)
    projections = 4 * 2 * 16 * 16  # query, key, value, out
    scores = 2 * 2 * 16 * 64 / 2  # logits and sum over values, half of 64 keys on average
    mlp = 3 * 2 * 16 * 24
    head = 2 * 16 * 64  # vocabulary padded to 64
    forward = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))).flops_per_token(64)
    assert forward == projections + scores + mlp + head
    assert flops.train_flops_per_token(forward) == 3 * forward
    # 8 devices at 989 TFLOP/s; 1e9 tokens/s
    assert flops.mfu(1e9, forward, 8, "NVIDIA H200") == pytest.approx(1e9 * 3 * forward / (8 * 989e12))
    assert flops.mfu(989e12 / (3 * forward), forward, 1, "NVIDIA H200") == pytest.approx(1.0)
