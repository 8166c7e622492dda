"""Training steps of jax-linear-attention's presets, by its own step, optimizer and recomputation."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from based_jax import devices
from based_jax.bench.memory import peak_bytes
from based_jax.bench.runner import Runner
from based_jax.bench.train_size import Size

VOCAB_SIZE = 50_304
"""Its own for GPT-2's tokens: the presets of 1.3B have 128,256, which is another head."""
LEARNING_RATE = 3e-4


def measure(preset: str, size: Size) -> dict[str, Any]:
    """Return how long a step of a preset takes, and what it needs; `mfu` counts FLOPs as the library does."""
    import equinox as eqx
    from jla.config import OptimConfig
    from jla.models import build_model, get_preset
    from jla.training.optimizers import optimizer_from_config
    from jla.training.step import LossConfig, build_train_step, lm_loss

    config = get_preset(preset)
    config = dataclasses.replace(config, vocab_size=min(config.vocab_size, VOCAB_SIZE))
    key = jax.random.key(0)
    model = eqx.filter_jit(lambda key: build_model(config, key=key))(key)
    optimizer = optimizer_from_config(OptimConfig(), lambda step: jnp.float32(LEARNING_RATE))
    opt_state = jax.jit(optimizer.init)(eqx.filter(model, eqx.is_inexact_array))
    step = build_train_step(optimizer, lm_loss(LossConfig()))
    batch = _batch(size, config.vocab_size)
    begin = time.perf_counter()
    step.use_compiled(step.lower(model, opt_state, batch, key).compile())
    compile_seconds = time.perf_counter() - begin

    def take(state: Any, batch: Any) -> tuple[Any, Any]:
        model, opt_state, metrics, key = step(*state[:2], batch, state[2])
        return (model, opt_state, key), metrics

    seconds = Runner(take, (model, opt_state, key), [batch]).median_seconds(size.steps)
    return {
        "milliseconds": round(1e3 * seconds, 3),
        "remat": config.remat,
        "vocab_size": config.vocab_size,
        "mfu": _mfu(config, size, seconds),
        "peak_bytes": peak_bytes(),
        "compile_seconds": round(compile_seconds, 2),
    }


def _batch(size: Size, vocab_size: int) -> dict[str, jax.Array]:
    """Return one microbatch of random tokens."""
    ids = jax.random.randint(jax.random.key(1), (1, size.rows, size.seq_len + 1), 0, vocab_size)
    return {"input_ids": ids[..., :-1], "labels": ids[..., 1:]}


def _mfu(config: Any, size: Size, seconds: float) -> float | None:
    from jla.training.performance import estimate_flops_per_token

    device = devices.find(jax.devices()[0].device_kind)
    if device is None or device.peak_bf16_flops is None:
        return None
    found = dataclasses.astuple(estimate_flops_per_token(config, size.seq_len))
    return 3 * sum(found) * size.rows * size.seq_len / seconds / device.peak_bf16_flops
