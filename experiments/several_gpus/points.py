"""Points of one sweep for any number of GPUs: 12 architectures, each a group that compiles once, of two rates each."""

from based_jax.sweep import Sweep, param, product

BASE = {
    "model": {"layers": (), "d_model": 64, "vocab_size": 8192, "mlp": "identity", "norm": "layer", "dtype": "bfloat16"},
    "data": {"kind": "mqar", "preset": "tiny", "vocab_size": 8192},
    "optim": {"schedule": "cosine_per_epoch"},
    "epochs": 8,
    "batch_size": 256,
}
SOME = {"num_examples": 20_000, "seq_len": 256, "num_kv_pairs": 16}
DATA = {"data.train": (SOME,), "data.test": (SOME | {"num_examples": 1_000},)}
WIDTHS, FEATURES = (32, 64, 96, 128), (4, 8, 16)
FEW = {"num_examples": 640, "seq_len": 32, "num_kv_pairs": 4}
TINY = {"model.vocab_size": 64, "data.vocab_size": 64, "data.train": (FEW,), "data.test": (FEW,), "epochs": 1}
"""For a look at whether it runs."""


def layers(features):
    """Return a short convolution below Taylor attention."""
    return ("base_conv", {"kernel_size": 3}), ("taylor", {"num_heads": 1, "feature_dim": features})


def get_sweep(variant="whole"):
    """Return the sweep, or the `tiny` one of four points."""
    rates = param("optim.lr", [1e-3, 3e-3])
    if variant == "tiny":
        return Sweep(BASE, product([TINY], param("model.layers", [layers(4), layers(8)]), rates))
    widths = param("model.d_model", WIDTHS)
    return Sweep(BASE, product([DATA], widths, param("model.layers", list(map(layers, FEATURES))), rates))


VARIANTS = ("whole", "tiny")
