"""DNA, base by base: a question of the Based paper (arXiv 2402.18668) at a size for a minute of one GPU.

    python -m based_jax train --config=configs/dna.py:based_8k --workdir=runs/dna
    python -m based_jax train --config=configs/dna.py:based_8k --workdir=runs/hg38 --config.data.path=hg38.fa.gz

Variants: based, attention, mamba and hyena, each of 6.53 to 6.58 million parameters, trained on 8,192 bases a row (_8k)
or 32,768 (_32k), 131,072 bases a step. The default data is what the package ships: the genome of E. coli and a megabase
of human chromosome 22, whose last tenths are held out. All of what is held out is read at each of four lengths;
`eval/NAME@LENGTH/loss` is in nats, bits over ln 2.
"""

from ml_collections import ConfigDict

HEADS = {"num_heads": 4}
BASED = (("conv", {}), ("taylor", HEADS), ("window", {**HEADS, "window": 64}), ("conv", {})) * 2
HYENA_MLP_DIMS = {8192: 656, 32768: 560}
"""By the bases of a row, whose positions are parameters too."""
MODELS = {
    "based": lambda seq_len: {"layers": BASED, "mlp_dim": 672},
    "attention": lambda seq_len: {"layers": (("attention", HEADS),) * 8, "mlp_dim": 728},
    "mamba": lambda seq_len: {"layers": (("mamba", {}),) * 15, "mlp": "none"},
    # its table of positions is of the row's length, and learned
    "hyena": lambda seq_len: {
        "layers": (("hyena", {"l_max": seq_len}),) * 8,
        "mlp_dim": 656 if seq_len < 10**4 else 560,
    },
}
SEQ_LENS = {"8k": 8192, "32k": 32768}
TEST_LENGTHS = (512, 2048, 8192, 32768)
BASES_A_STEP = 131072
VARIANTS = tuple(f"{model}_{length}" for length in SEQ_LENS for model in MODELS)


def get_config(variant="based_8k"):
    """Return a model and what it is trained on; Hyena reads nothing that is longer than its rows."""
    model, length = variant.split("_")
    seq_len = SEQ_LENS[length]
    config = ConfigDict(
        {
            "model": {"d_model": 256, "vocab_size": 5, **MODELS[model](seq_len)},
            "data": {
                "kind": "dna",
                "seq_len": seq_len,
                "test_lengths": tuple(x for x in TEST_LENGTHS if model != "hyena" or x <= seq_len),
            },
            "optim": {"lr": 2e-3, "final_lr": 2e-4},
            "steps": 300,
            "batch_size": BASES_A_STEP // seq_len,
            "log_every": 20,
        }
    )
    config.optim.warmup_steps = config.get_ref("steps") // 10
    return config
