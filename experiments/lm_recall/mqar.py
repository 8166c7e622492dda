"""The orders and ratios of Based's layers on MQAR: six layers of width 128, by the recipe of the paper's Figure 2.

    python -m based_jax sweep run experiments/lm_recall/mqar.py --store=experiments/lm_recall/results/mqar

Variants: order; tiny. Without an MLP, as in Figure 2, parameters are equal but for the mixers' own projections.
"""

from based_jax.sweep import Sweep, param, product
from experiments.mqar_pareto import sweeps as figure2

CONV = figure2.CONV
FAR = ("taylor", {"num_heads": 1, "feature_dim": 8})
NEAR = ("window", {"num_heads": 1, "window": 33, "rotary_fraction": 0.0, "bias": True})
ORDERS = {
    "interleaved": [CONV, FAR, NEAR] * 2,
    "early": [FAR, NEAR] * 2 + [CONV] * 2,
    "middle": [CONV, FAR, NEAR, FAR, NEAR, CONV],
    "late": [CONV] * 2 + [FAR, NEAR] * 2,
    "far_first": [FAR] * 2 + [NEAR] * 2 + [CONV] * 2,
    "near_first": [CONV] * 2 + [NEAR] * 2 + [FAR] * 2,
    "1:1:4": [CONV, CONV, FAR, CONV, CONV, NEAR],
    "3:3:0": [FAR, NEAR] * 3,
    "3:1:2": [CONV, FAR, FAR, CONV, FAR, NEAR],
    "1:3:2": [CONV, NEAR, NEAR, CONV, FAR, NEAR],
}
"""By name, as in `sweeps.ORDERS` and `sweeps.RATIOS`: layers in the order of depth."""
TINY = {"model.d_model": 16, "data.preset": "tiny", "epochs": 1}


def get_sweep(variant="order"):
    """Return the sweep of that name."""
    rest = TINY if variant == "tiny" else {"model.d_model": 128}
    layers = [{"model.layers": tuple(found)} | figure2.TRANSFORMER_BLOCKS | rest for found in ORDERS.values()]
    return Sweep(figure2.BASE, product(layers, param("optim.lr", figure2.RATES[:2])))
