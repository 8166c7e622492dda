"""Drafted tokens: what is drawn is what would be without them."""

import numpy as np
from helpers.cases import parametrize_some
from helpers.decoding import random_decoder
from helpers.small_mixers import SMALL

from based_jax.generate import Drafts, Request, Sampling
from based_jax.generate.blocks import blocks
from based_jax.generate.rows import begun
from based_jax.nn.lm import LMConfig
from based_jax.nn.mixers import MIXERS

VOCAB, NEW = 50, 14
HOT = Sampling(temperature=1.0, top_k=20)
PROMPTS = [[7], [3, 1, 4, 1, 5], [i * 7 % VOCAB for i in range(37)]]
REQUESTS = [
    Request(prompt, NEW, sampling, seed=seed)
    for seed, (prompt, sampling) in enumerate(zip(PROMPTS * 2, [Sampling()] * 3 + [HOT] * 3))
]


def decoder_of(*layers, seed=0, **options):
    return random_decoder(LMConfig(layers=layers, d_model=16, vocab_size=VOCAB, dtype="float32", **options), seed)


def drawn(decoder, requests, drafts=None, steps=4):
    """Return the tokens of each request, and the blocks."""
    rows = begun(decoder, requests, 64, chunk_tokens=16, drafts=drafts)
    found = list(blocks(decoder, rows, steps, drafts))
    tokens = [
        np.concatenate([block.tokens[i, : block.drawn[i]] for block in found]).tolist() for i in range(len(requests))
    ]
    return tokens, found


BUDGET = {"num_heads": 2, "cache_policy": "h2o", "cache_budget": 24}
LAYER = {kind: (kind, SMALL.get(kind, {})) for kind in MIXERS}
LAYER |= {
    "flush": ("taylor", SMALL["taylor"] | {"flush": 8}),
    "a budget": ("attention", BUDGET),
}


@parametrize_some("kind", LAYER, ordinary=("flush", "window"))
def test_drafts_change_no_token(kind):
    decoder = decoder_of(LAYER[kind], ("conv", {}))
    expected, _ = drawn(decoder, REQUESTS)
    for drafts in (Drafts.by_lookup(3), Drafts.by_model(decoder, 3)):
        tokens, found = drawn(decoder, REQUESTS, drafts)
        print([b.offered for b in found], [b.drawn for b in found], [b.steps for b in found])
        assert tokens == expected
