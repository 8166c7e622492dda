"""Small language models with equal states: does what MQAR shows hold on real text?

Variants: study, all models with three rates and two seeds; order, the layers of Based in other orders and ratios. The
first points are of all models with the rate in the middle and one seed, so that a whole table exists early. The text
is that of the folder runs/corpus (see the README). What runs are asked is in `measures.py`.
"""

from based_jax.sweep import Sweep, chain, param, product

D_MODEL, DEPTH, SEQ_LEN = 512, 12, 1024
STATE_ELEMENTS = 786_432
"""Of one sequence, in all layers: 65,536 a layer, by the accounting of the paper, without convolutions."""
BASE = {
    "model": {"vocab_size": 50_257, "d_model": D_MODEL, "dtype": "bfloat16", "layers": ()},
    "data": {"kind": "text", "tokenizer": "gpt2", "seq_len": SEQ_LEN, "path": "runs/corpus"},
    "optim": {"lr": 1e-3, "warmup_steps": 100, "final_lr": 1e-4},
    "steps": 1_140,
    "batch_size": 16,
    "seed": 123,
}
"""18.7 million tokens a run, one and a half epochs of the corpus."""
RATES = (1.2e-3, 6e-4, 2.4e-3)
SEEDS = (123, 124)
HEADS = {"num_heads": 8}
NEAR = ("window", HEADS | {"window": 65})
FAR = ("taylor", HEADS)
CONV = ("conv", {})
BASED_NEAR = ("window", HEADS | {"window": 115})
"""What Taylor's states, of four layers rather than twelve, leave of the elements."""
GATED_DELTA = ("gated_deltanet", {"expand_v": 1.0})
MAMBA2 = ("mamba2", {"d_state": 64})


def model(layers, mlp_dim):
    """Return the overrides of a model; the width of the MLP makes parameters equal, 56 million."""
    return {"model.layers": tuple(layers), "model.mlp_dim": mlp_dim}


MODELS = {
    "based": model([CONV, FAR, BASED_NEAR] * 4, 928),
    "attention": model([("attention", HEADS)] * DEPTH, 960),
    "window": model([NEAR] * DEPTH, 960),
    "mamba2": model([MAMBA2] * DEPTH, 576),
    "gated_deltanet": model([GATED_DELTA] * DEPTH, 768),
    "gla": model([("gla", {"expand_v": 2.0})] * DEPTH, 448),
    "deltanet": model([("deltanet", {})] * DEPTH, 960),
    "gated_deltanet_window": model([GATED_DELTA, NEAR] * 6, 864),
    "mamba2_window": model([MAMBA2, NEAR] * 6, 768),
    "rwkv7": model([("rwkv7", {"head_dim": 128})] * DEPTH, 768),
    "mamba": model([("mamba", {"d_state": 64})] * DEPTH, 448),
    "gsa": model([("gsa", {})] * DEPTH, 864),
}
"""By the name of a family or a hybrid. Values, states, windows are as wide as makes states equal; attention's grows."""
ORDERS = {
    "early": model([FAR, BASED_NEAR] * 4 + [CONV] * 4, 928),
    "middle": model([CONV] * 2 + [FAR, BASED_NEAR] * 4 + [CONV] * 2, 928),
    "late": model([CONV] * 4 + [FAR, BASED_NEAR] * 4, 928),
    "far_first": model([FAR] * 4 + [BASED_NEAR] * 4 + [CONV] * 4, 928),
    "near_first": model([CONV] * 4 + [BASED_NEAR] * 4 + [FAR] * 4, 928),
}
"""The layers of "based", which is interleaved, in other orders."""
RATIOS = {
    "2:2:8": model([CONV, CONV, FAR, CONV, CONV, BASED_NEAR] * 2, 768),
    "3:3:6": model([CONV, FAR, CONV, BASED_NEAR] * 3, 848),
    "6:6:0": model([FAR, BASED_NEAR] * 6, 1088),
    "1:7:4": model([CONV, BASED_NEAR, BASED_NEAR] * 2 + [CONV, FAR, BASED_NEAR] + [CONV, BASED_NEAR, BASED_NEAR], 864),
    "7:1:4": model([CONV, FAR, FAR] * 2 + [CONV, FAR, BASED_NEAR] + [CONV, FAR, FAR], 992),
}
"""Interleaved, in other ratios of Taylor, window and convolution; parameters are equal, and states are not."""
SWEEPS = {"study": MODELS, "order": ORDERS | RATIOS}


def name_of(layers, default=""):
    """Return the name of the model with these layers."""
    named = {name: found for models in SWEEPS.values() for name, found in models.items()}
    return next((name for name, found in named.items() if found["model.layers"] == layers), default)


def get_sweep(variant="study"):
    """Return the sweep of that name, or of one model of any."""
    from experiments.lm_recall.measures import StudyMeasures  # imports all that measures a model

    models = (SWEEPS | {name: {name: found} for found in SWEEPS.values() for name, found in found.items()})[variant]
    settings = chain(
        product(param("optim.lr", RATES[:1]), param("seed", SEEDS[:1])),
        product(param("optim.lr", RATES[1:]), param("seed", SEEDS[:1])),
        product(param("optim.lr", RATES), param("seed", SEEDS[1:])),
    )
    points = [found | setting for setting in settings for found in models.values()]
    return Sweep(BASE, points, measures=StudyMeasures, keep_runs=False)
