"""Small language models with equal states: does what MQAR shows hold on real text?

    python -m based_jax sweep run experiments/lm_recall/sweeps.py:study --store=runs/lm_recall

Variants: study, all models with three rates and two seeds, or one model of it (based, mamba, ...); order, the layers of
Based in other orders. The text is that of the folder runs/corpus (see the README); a run is six epochs of it.
"""

from based_jax.sweep import Sweep, chain, param, product

D_MODEL, DEPTH, SEQ_LEN = 512, 12, 1024
STATE_ELEMENTS = 786_432
"""Of one sequence, in all layers: 65,536 a layer, by the accounting of the paper, without convolutions."""
BASE = {
    "model": {"vocab_size": 50_257, "d_model": D_MODEL, "dtype": "bfloat16", "scan_layers": True, "layers": ()},
    "data": {"kind": "text", "tokenizer": "gpt2", "seq_len": SEQ_LEN, "path": "runs/corpus"},
    "optim": {"lr": 1e-3, "warmup_steps": 100, "final_lr": 1e-4},
    "steps": 2_280,
    "batch_size": 32,
    "eval_every": 380,
    "log_every": 20,
    "seed": 123,
}
RATES = (6e-4, 1.2e-3, 2.4e-3)
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
    """Return a space of one point; the width of the MLP makes parameters equal, 56 million."""
    return [{"model.layers": tuple(layers), "model.mlp_dim": mlp_dim}]


MODELS = {
    "attention": model([("attention", HEADS)] * DEPTH, 960),
    "window": model([NEAR] * DEPTH, 960),
    "based": model([CONV, FAR, BASED_NEAR] * 4, 928),
    "mamba": model([("mamba", {"d_state": 64})] * DEPTH, 448),
    "mamba2": model([MAMBA2] * DEPTH, 576),
    "gla": model([("gla", {"expand_v": 2.0})] * DEPTH, 448),
    "deltanet": model([("deltanet", {})] * DEPTH, 960),
    "gated_deltanet": model([GATED_DELTA] * DEPTH, 768),
    "rwkv7": model([("rwkv7", {"head_dim": 128})] * DEPTH, 768),
    "gsa": model([("gsa", {})] * DEPTH, 864),
    "gated_deltanet_window": model([GATED_DELTA, NEAR] * 6, 864),
    "mamba2_window": model([MAMBA2, NEAR] * 6, 768),
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


def get_sweep(variant="study"):
    """Return the sweep of that name."""
    spaces = {"study": chain(*MODELS.values()), "order": chain(*ORDERS.values()), **MODELS}
    return Sweep(BASE, product(spaces[variant], param("optim.lr", RATES), param("seed", SEEDS)))
