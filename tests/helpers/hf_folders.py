"""Small models that have a published layout, those that have none, and their folders' config.json."""

import functools
import json

from flax import nnx

from based_jax.nn.lm import LM, LMConfig
from helpers.random_models import filled

D = 16
BASED = (
    ("conv", {"kernel_size": 4}),
    ("taylor", {"num_heads": 2, "feature_dim": 4}),
    ("window", {"num_heads": 4, "window": 3}),
)
MODELS = {
    "based": LMConfig(BASED * 2 + BASED[:1], d_model=D, vocab_size=11),
    "convolutions": LMConfig((("conv", {"expand": 2}),), d_model=D, vocab_size=11),
    "untied": LMConfig(BASED[:1], d_model=D, vocab_size=11, tie_embeddings=False, norm_eps=1e-3, embed_dropout=0.1),
    "attention": LMConfig(
        (("attention", {"num_heads": 2, "rotary_fraction": 0.25, "rotary_base": 5e3}),) * 2,
        d_model=D,
        vocab_size=11,
        pad_vocab_multiple=16,
        mlp_dim=20,
    ),
}
REFUSED = {
    "zoology's norm": LMConfig(BASED, d_model=D, norm="layer"),
    "zoology's last norm": LMConfig(BASED, d_model=D, final_norm="layer"),
    "no MLP": LMConfig(BASED, d_model=D, mlp="identity"),
    "another mixer": LMConfig((("base_conv", {}),), d_model=D),
    "attention and others": LMConfig((*BASED, ("attention", {"num_heads": 2})), d_model=D),
    "two windows": LMConfig((*BASED, ("window", {"num_heads": 4, "window": 5})), d_model=D),
    "biases": LMConfig((("attention", {"num_heads": 2, "bias": True}),), d_model=D),
}


@functools.cache
def model_of(name):
    return nnx.jit(lambda: LM(MODELS[name], rngs=nnx.Rngs(0)))()


def random_lm(config, rng):
    return filled(lambda: LM(config, rngs=nnx.Rngs(0)), rng)


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
