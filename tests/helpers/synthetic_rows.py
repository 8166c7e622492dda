"""Rows as a sweep writes them, with invented accuracies: for trying pictures, never results."""

import hashlib
import json
import math

from based_jax.nn.accounting import state_bytes
from based_jax.nn.mixers import MIXERS

SEGMENTS = {"64x4": 4, "64x8": 8, "64x16": 16, "128x32": 32, "256x64": 64, "512x128": 128, "1024x256": 256}
WIDTHS = (64, 128, 256)
RATES = (1e-3, 3.16e-3, 1e-2, 3.16e-2)
CONV = ("base_conv", {"kernel_size": 3})
SKILL = {"taylor": 1.0, "gated_deltanet": 2.5, "deltanet": 1.8, "mamba": 0.7, "window": 0.2, "linear": 0.4}
"""How many pairs a byte holds, invented."""


def row(layers, d_model, *, lr=1e-2, seed=0, accuracy=None, segments=None, **more):
    """Return one row; the accuracy follows from the bytes of state and the learning rate where it is not given."""
    layers = [[kind, vars(MIXERS[kind].Config(**options))] for kind, options in layers]
    segments = segments or invented(layers, d_model, lr, seed)
    accuracy = sum(segments.values()) / len(segments) if accuracy is None else accuracy
    model = {"layers": layers, "d_model": d_model, "vocab_size": 8192}
    config = {"model": model, "optim": {"lr": lr, "weight_decay": 0.1}, "seed": seed, "epochs": 32}
    elements = state_bytes(layers, d_model, 1024, convolution=True) // 4
    return {
        "id": hashlib.sha256(json.dumps(config).encode()).hexdigest()[:12],
        "sweep": "invented",
        "overrides": {"optim.lr": lr, "model.d_model": d_model},
        "config": config,
        "status": "finished",
        "accuracy": accuracy,
        "segments": segments,
        "curve": [accuracy * (1 - 0.5**epoch) for epoch in range(1, 6)],
        "losses": [9 * 0.5**epoch for epoch in range(1, 6)],
        "state_elements": elements,
        "state_bytes": 4 * elements,
        "params": 8192 * d_model + 24 * d_model**2,
        "steps": 22624,
        "seconds": 41.5,
        "device": "invented device",
        "versions": {"jax": "0"},
        "revision": "0123456789abcdef",
        "command": "python -m based_jax sweep --invented",
    } | more


def invented(layers, d_model, lr, seed):
    """Return an accuracy for each segment."""
    capacity = state_bytes(layers, d_model, 1024, convolution=False) / 150 * SKILL.get(layers[-1][0], 0.6)
    noise = math.sin(97 * seed + 13 * math.log(lr) + d_model)
    capacity *= math.exp(-0.6 * math.log10(lr / 8e-3) ** 2 * 4 + 0.15 * noise)
    return {name: 1 / (1 + (pairs / capacity) ** 1.5) for name, pairs in SEGMENTS.items()}


def architectures():
    """Yield (layers, d_model) of several families."""
    for d in WIDTHS:
        for k in (8, 16, 24):
            yield [CONV, ("taylor", {"num_heads": 1, "feature_dim": k})], d
            yield [("mamba", {"d_state": k})] * 2, d
        yield [CONV, ("gated_deltanet", {"num_heads": 2})], d
        yield [CONV, ("deltanet", {"num_heads": 2})], d
        yield [CONV, ("attention", {"num_heads": 1})], d
    for w in (8, 32, 128, 512):
        yield [CONV, ("window", {"num_heads": 1, "window": w})], 128


def rows(seeds=3):
    """Return rows of several families, four learning rates and some seeds of each configuration."""
    return [row(layers, d, lr=lr, seed=seed) for layers, d in architectures() for lr in RATES for seed in range(seeds)]


def map_rows():
    """Return rows of feature maps over widths, of as many dimensions as the model has and of 16."""
    names = ("relu", "elu", "cosformer", "hedgehog")
    linear = [("linear", {"num_heads": 1, "feature_map": name}) for name in names]
    fixed = [(d, ("taylor", {"num_heads": 1})) for d in WIDTHS]
    for kind, options in linear:
        fixed += [(d, (kind, options | {"feature_dim": k})) for d in WIDTHS for k in (d, 16)]
    return [row([CONV, mixer], d, lr=lr) for d, mixer in fixed for lr in RATES]


def part_rows():
    """Return rows of Based's parts, alone and together."""
    window, taylor = ("window", {"num_heads": 1, "window": 64}), ("taylor", {"num_heads": 1})
    sets = ([CONV], [window], [taylor], [CONV, window], [CONV, taylor], [window, taylor], [CONV, window, taylor])
    return [row(layers, 128, lr=lr, seed=seed) for layers in sets for lr in RATES for seed in range(2)]
