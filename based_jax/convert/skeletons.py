"""Under which state_dict keys the language models of publications have their parameters."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

KeyGroup = tuple[str, ...]  # reference keys whose arrays, concatenated, are one of our parameters


class Layer(NamedTuple):
    """Names inside one layer of a publication: norms, mixer and MLP, with `{}` for the layer's number there."""

    norm1: str
    mixer: str
    norm2: str = ""
    fc1: KeyGroup = ()
    fc2: KeyGroup = ()


class Skeleton(NamedTuple):
    """Names of a publication's language model. Its layer i holds our layers i * len(layers) and following.

    Of several with one embedding it is that whose first mixer the weights have.
    """

    publication: str
    embedding: str
    norm: str
    layers: tuple[Layer, ...]
    head: str = "lm_head.weight"
    embed_norm: str = ""


def _gpt(publication: str, root: str, mixer: str, mlp: str) -> Skeleton:
    layer = f"{root}.layers.{{}}"
    fc1, fc2 = ((f"{layer}.{mlp}.{name}.weight",) for name in ("fc1", "fc2"))
    names = Layer(f"{layer}.norm1", f"{layer}.{mixer}", f"{layer}.norm2", fc1, fc2)
    return Skeleton(publication, f"{root}.embeddings.word_embeddings.weight", f"{root}.ln_f", (names,))


def _mamba(publication: str, embedding: str, norm: str) -> Skeleton:
    names = Layer("backbone.layers.{}.norm", "backbone.layers.{}.mixer")
    return Skeleton(publication, f"backbone.{embedding}.weight", f"backbone.{norm}", (names,))


LLAMA_LAYER = "model.layers.{}"
OWN = "based_jax"
SKELETONS = {
    "based": _gpt("based", "transformer", "mixer", "mlp"),
    "zoology": _gpt("zoology", "backbone", "sequence_mixer.mixer", "state_mixer"),
    "zoology_alike": _gpt("zoology", "backbone", "sequence_mixer", "state_mixer"),
    "zoology_mamba": _mamba("zoology", "embeddings.word_embeddings", "ln_f"),
    "mamba": _mamba("mamba", "embedding", "norm_f"),
    "mamba_hf": _mamba("mamba", "embeddings", "norm_f"),
    "llama": Skeleton(
        "llama",
        "model.embed_tokens.weight",
        "model.norm",
        (
            Layer(
                f"{LLAMA_LAYER}.input_layernorm",
                f"{LLAMA_LAYER}.self_attn",
                f"{LLAMA_LAYER}.post_attention_layernorm",
                (f"{LLAMA_LAYER}.mlp.up_proj.weight", f"{LLAMA_LAYER}.mlp.gate_proj.weight"),
                (f"{LLAMA_LAYER}.mlp.down_proj.weight",),
            ),
        ),
    ),
    "rwkv4": Skeleton(
        "rwkv4",
        "rwkv.embeddings.weight",
        "rwkv.ln_out",
        (
            Layer("rwkv.blocks.{}.ln1", "rwkv.blocks.{}.attention"),
            Layer("rwkv.blocks.{}.ln2", "rwkv.blocks.{}.feed_forward"),
        ),
        head="head.weight",
        embed_norm="rwkv.blocks.0.pre_ln",
    ),
    OWN: Skeleton(
        OWN,
        "embed.weight",
        "norm",
        (
            Layer(
                "layers.{}.norm1",
                "layers.{}.mixer",
                "layers.{}.norm2",
                ("layers.{}.mlp.fc1.weight",),
                ("layers.{}.mlp.fc2.weight",),
            ),
        ),
        head="head.weight",
        embed_norm="embed_norm",
    ),
}
"""By name; "zoology" has `Hybrid` between a layer and its mixer, "zoology_alike" one mixer in all layers without it.

Ours names all parameters of all mixers, by their paths.
"""
REPEATED_HEADS = ("based", "mamba")
"""Whose files hold a tied head beside the embedding."""


def skeleton_of(weights: Mapping[str, np.ndarray]) -> str:
    """Return the key of `SKELETONS` whose embedding, and if possible first mixer, the weights have; else "based"."""
    found = [name for name, skeleton in SKELETONS.items() if skeleton.embedding in weights]
    mixers = {name: f"{SKELETONS[name].layers[0].mixer.format(0)}." for name in found}
    whole = [name for name in found if any(key.startswith(mixers[name]) for key in weights)]
    return next(iter(whole + found), "based")
