"""MQAR by the recipe of the paper's Figure 2, for every mixer, and Figure 3.

    python -m based_jax sweep run experiments/mqar_pareto/sweeps.py:figure2 --store=runs/figure2

Variants: figure2; its parts headline, narrow and wide, or one mixer of it (based, window, mamba, ...); seeds of the
headline, disputed; needle and forgetting, which ask other things of the best of them; figure3 and figure3_k16, or one
width of them (figure3_64, figure3_k16_128, ...); ablation; tiny. A command that a row names belongs to the revision
that it names.
Source: HazyResearch/zoology:zoology/experiments/{paper_configs/arxiv24_based_figure{2,3}/configs.py,models_repo.py}.
"""

from based_jax.sweep import Sweep, chain, param, product

SEQ_LEN = 1024
CONV = ("base_conv", {"kernel_size": 3})
TRANSFORMER_BLOCKS = {"model.embed_dropout": 0.1}
MAMBA_BLOCKS = {"model.mlp": "none", "model.norm": "rms", "model.final_norm": "layer"}
"""What zoology's two kinds of blocks have beside the base: the second ones no dropout, one norm each, another last."""
BASE = {
    "model": {"vocab_size": 8192, "mlp": "identity", "norm": "layer", "dtype": "bfloat16", "d_model": 64, "layers": ()},
    "data": {"kind": "mqar", "preset": "figure2"},
    "optim": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "weight_decay": 0.1,
        "decay": "all",
        "clip_norm": None,
        "schedule": "cosine_per_epoch",
    },
    "epochs": 32,
    "batch_size": 256,
    "seed": 123,
    "stop_accuracy": 0.99,
}
RATES = [round(10 ** (-3 + 0.5 * i), 6) for i in range(4)]


def hybrid(d_model, kind, **options):
    """Return a space of one point: a short convolution below a mixer."""
    return [{"model.d_model": d_model, "model.layers": (CONV, (kind, options)), **TRANSFORMER_BLOCKS}]


def twice(d_model, kind, **options):
    """Return a space of one point: two layers of a mixer."""
    return [{"model.d_model": d_model, "model.layers": ((kind, options),) * 2, **TRANSFORMER_BLOCKS}]


def based(d_model, feature_dim):
    """Return the paper's Based at this width."""
    return hybrid(d_model, "taylor", num_heads=1, feature_dim=feature_dim)


def window(size):
    """Return a sliding window over so many tokens and the query's own, as zoology's `block_size` counts."""
    return hybrid(128, "window", num_heads=1, rotary_fraction=0.0, bias=True, window=size + 1)


def gated_deltanet(d_model, **options):
    """Return Gated DeltaNet without its output gate, as zoology's points are."""
    return hybrid(d_model, "gated_deltanet", num_heads=2, use_gate=False, **options)


def mamba(d_model, kind, d_state):
    """Return a space of one point: two layers of Mamba or Mamba-2, in blocks of their own."""
    return [{"model.d_model": d_model, "model.layers": ((kind, {"d_state": d_state}),) * 2, **MAMBA_BLOCKS}]


WIDTHS = (64, 128, 256)
STATES = (8, 16, 24)
RWKV7_RANKS = {"decay_low_rank_dim": 16, "gate_low_rank_dim": 64, "a_low_rank_dim": 16, "v_low_rank_dim": 16}
FIGURE2 = {
    "based": chain(*(based(d, k) for d in (48, 64, 128) for k in STATES), based(256, 16)),
    "attention": chain(*(hybrid(d, "attention", num_heads=1, rotary_fraction=0.0, bias=True) for d in (64, 128))),
    "window": chain(*(window(2**n) for n in range(3, 11))),
    "mamba": chain(*(mamba(d, "mamba", n) for d in WIDTHS for n in STATES)),
    "mamba2": chain(*(mamba(d, "mamba2", 16) for d in WIDTHS)),
    "h3": chain(*(twice(d, "h3", d_state=d // 4, head_dim=2) for d in WIDTHS)),
    "hyena": chain(*(twice(d, "hyena", l_max=SEQ_LEN) for d in WIDTHS)),
    "base_conv": chain(*(twice(d, "base_conv", kernel_size=3) for d in WIDTHS)),
    "gla": chain(*(hybrid(d, "gla", num_heads=2) for d in WIDTHS)),
    "retnet": chain(*(hybrid(d, "retnet", num_heads=2) for d in WIDTHS)),
    "rwkv7": chain(*(hybrid(d, "rwkv7", head_dim=64, **RWKV7_RANKS) for d in WIDTHS)),
    "deltanet": chain(*(hybrid(d, "deltanet", num_heads=2) for d in WIDTHS)),
    "gated_deltanet": chain(*(gated_deltanet(d) for d in WIDTHS)),
    "kda": chain(*(hybrid(d, "kda", num_heads=2, head_dim=d // 2) for d in WIDTHS)),
}
HEADLINE = chain(
    based(64, 16),
    based(128, 16),
    based(256, 16),
    window(64),
    window(1024),
    FIGURE2["attention"][:1],
    mamba(256, "mamba", 16),
    hybrid(128, "deltanet", num_heads=2),
    gated_deltanet(128),
)
WIDE = 256
"""Models from this width on take two to three times as long as the next smaller ones."""


def rest(wide):
    """Return Figure 2 without the headline points: those of that width, or the narrower ones."""
    found = [point for point in chain(*FIGURE2.values()) if point not in HEADLINE]
    return [point for point in found if (point["model.d_model"] >= WIDE) == wide]


DEMANDS = chain(
    *(based(d, k) for d, k in ((64, 8), (64, 16), (128, 24))),
    *(window(size) for size in (16, 64, 256)),
    *(gated_deltanet(d) for d in WIDTHS),
    *(hybrid(d, kind, num_heads=2) for kind in ("deltanet", "gla", "retnet") for d in WIDTHS),
    FIGURE2["kda"],
    FIGURE2["rwkv7"],
    *(mamba(d, "mamba", n) for d, n in ((128, 8), (256, 16))),
    FIGURE2["mamba2"],
    FIGURE2["h3"],
    FIGURE2["attention"][:1],
)
"""Of each mixer the best configurations of figure2 within 16, 64 and 256 KiB of state; attention, whose state grows.

Not Hyena, whose filter has as many taps as its rows have tokens, nor the convolution alone, which recalls nothing."""
DEMAND_RATES = RATES[:2]
DEMAND_LENGTHS = (256, 512, 1024, 2048, 4096)
"""Trained at the first at most, tested at all."""


def needle_task():
    """Return one or four needles at any depth of up to 256 tokens, and tests at five depths of all lengths."""
    train = [needles(20_000, length, None, number) for length in (64, 128, 256) for number in (1, 4)]
    test = [needles(100, n, depth / 4, number) for n in DEMAND_LENGTHS for depth in range(5) for number in (1, 4)]
    return {"kind": "needle", "train": tuple(train), "test": tuple(test)}


def needles(num_examples, seq_len, depth, num_needles):
    """Return a segment of needles."""
    return {"num_examples": num_examples, "seq_len": seq_len, "depth": depth, "num_needles": num_needles}


def forgetting_task():
    """Return keys that are written up to twice in training, and up to four times in rows of all lengths in tests."""
    train = [
        written(n, length, keys, keys) for n, length, keys in ((40_000, 64, 4), (40_000, 128, 8), (40_000, 256, 16))
    ]
    test = [written(250, n, 16, updates) for n in DEMAND_LENGTHS for updates in (0, 16, 48)]
    return {"kind": "forgetting_mqar", "train": tuple(train), "test": tuple(test)}


def written(num_examples, seq_len, num_kv_pairs, num_updates):
    """Return a segment of MQAR with forgetting."""
    return {
        "num_examples": num_examples,
        "seq_len": seq_len,
        "num_kv_pairs": num_kv_pairs,
        "num_updates": num_updates,
    }


BASES = {
    "needle": BASE | {"data": needle_task(), "epochs": 16},
    "forgetting": BASE | {"data": forgetting_task(), "epochs": 16},
}
"""Of the sweeps that have another base."""

FIGURE3_WIDTHS = range(64, 513, 64)
MAPS = ("elu", "relu", "squared", "cosformer", "performer", "identity", "all_poly")


def linear(d_model, feature_map, feature_dim):
    """Return linear attention with this feature map of so many dimensions of queries and keys."""
    return hybrid(d_model, "linear", num_heads=1, feature_dim=feature_dim, feature_map=feature_map)


def figure3(widths=FIGURE3_WIDTHS):
    """Return Figure 3 at these widths: maps of as many dimensions as the model has, Taylor's of 16 and 24."""
    return chain(*(based(d, k) for d in widths for k in (16, 24)), *(linear(d, m, d) for m in MAPS for d in widths))


def figure3_k16(widths=FIGURE3_WIDTHS):
    """Return the maps without parameters at these widths, of 16 dimensions all, so that nothing else differs."""
    fixed = [name for name in MAPS if name != "all_poly"]
    return chain(*(based(d, 16) for d in widths), *(linear(d, m, 16) for m in fixed for d in widths))


def ablation():
    """Return Based's parts alone and together at width 128: convolution, window, Taylor attention."""
    taylor = ("taylor", {"num_heads": 1, "feature_dim": 16})
    near = ("window", {"num_heads": 1, "rotary_fraction": 0.0, "bias": True, "window": 64})
    stacks = ((CONV, CONV), (near, near), (taylor, taylor), (CONV, near), (CONV, taylor), (near, taylor))
    layers = param("model.layers", [*stacks, (CONV, near, taylor)])
    return product([{"model.d_model": 128, **TRANSFORMER_BLOCKS}], layers)


def disputed():
    """Return what to try where a headline point falls short: lower rates, another order of batches, other kernels."""
    model = gated_deltanet(128)
    low, least = round(10**-3.5, 6), 1e-3
    lower = product(model, param("optim.lr", [1e-4, low]))
    shuffled = product(model, param("optim.lr", [low, least]), param("data.shuffle", [True]))
    by = chain(*(gated_deltanet(128, impl=impl) for impl in ("hopper", "triton")))
    return chain(lower, shuffled, product(by, param("optim.lr", [least])))


def tiny():
    """Return a sweep that a laptop finishes in a minute: to see whether it runs."""
    few = {"num_examples": 3200, "seq_len": 32, "num_kv_pairs": 4}
    task = {
        "data.preset": "tiny",
        "data.vocab_size": 64,
        "data.train": (few,),
        "data.test": (few | {"num_examples": 320},),
    }
    small = {"model.vocab_size": 64, "model.init_std": 0.1, "model.d_model": 32, "epochs": 4, "batch_size": 64}
    layers = [(CONV, ("taylor", {"num_heads": 1, "feature_dim": 8})), (CONV, CONV)]
    return product([task | small], param("model.layers", layers), param("optim.lr", [3e-3, 1e-2]))


VARIANTS = {
    "figure2": lambda: product(chain(*FIGURE2.values()), param("optim.lr", RATES)),
    **{name: (lambda space=space: product(space, param("optim.lr", RATES))) for name, space in FIGURE2.items()},
    **{
        name: (lambda space=space: product(space, param("optim.lr", RATES)))
        for maps in (figure3, figure3_k16)
        for name, space in [(maps.__name__, maps()), *((f"{maps.__name__}_{d}", maps([d])) for d in FIGURE3_WIDTHS)]
    },
    "ablation": lambda: product(ablation(), param("optim.lr", RATES)),
    "headline": lambda: product(HEADLINE, param("optim.lr", RATES)),
    "narrow": lambda: product(rest(wide=False), param("optim.lr", RATES)),
    "wide": lambda: product(rest(wide=True), param("optim.lr", RATES)),
    "seeds": lambda: product(HEADLINE, param("optim.lr", RATES), param("seed", [124, 125])),
    **{name: (lambda: product(DEMANDS, param("optim.lr", DEMAND_RATES), param("seed", [123, 124]))) for name in BASES},
    "disputed": lambda: product(disputed(), param("seed", [123, 124])),
    "tiny": tiny,
}


def get_sweep(variant="figure2"):
    """Return the sweep of that name, its models drawn as zoology draws them.

    The base has no recipe of initial values: rows from before there was a choice have that base, and their points none.
    """
    return Sweep(BASES.get(variant, BASE), product(VARIANTS[variant](), param("model.init_recipe", ["zoology"])))
