"""Linearising a small model of random weights: layers, transfer, adapters, and what the page's settings say."""

import jax
import numpy as np
import pytest
from flax import nnx

from based_jax import LM, LMConfig
from based_jax.convert import taylor_window_from_attention
from based_jax.nn import lora
from based_jax.nn.mixers import mixer_class
from experiments.linearize import __main__ as linearize
from experiments.linearize import settings, training

HEADS = {"num_heads": 4, "num_kv_heads": 2, "rotary_fraction": 1.0}


@pytest.fixture(scope="module")
def teacher():
    config = LMConfig((("attention", HEADS),) * 3, d_model=16, vocab_size=24, init_std=0.3, scan_layers=True)
    return LM(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def student(teacher):
    return taylor_window_from_attention(teacher, 4, 3, (1, 2), sinks=1)


def batches(step):
    ids = np.random.default_rng(step).integers(0, 24, (2, 25))
    segment_ids = np.ones((2, 24), np.int32)
    segment_ids[0, :9], segment_ids[1, 20:] = 2, 0
    return {"inputs": ids[:, :-1], "labels": ids[:, 1:], "segment_ids": segment_ids}


def test_transfer_trains_new_parameters_of_each_layer_and_no_others(teacher, student):
    effort = training.Effort(transfer_steps=40)
    steps = list(training.transfer(teacher, student, lambda _: batches(0), effort))
    first, last = (np.mean([losses for _, losses in part], axis=0) for part in (steps[:5], steps[-5:]))
    assert first.shape == (2,) and (last < first).all()
    before, after = (lora.by_path(nnx.state(model)) for model in (student, steps[-1][0]))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == set(training.new_paths(nnx.state(student)))


def test_what_layers_read_and_return_is_the_teachers(teacher, close):
    batch = batches(0)
    inputs, outputs = jax.jit(training.mixed, static_argnums=3)(teacher, batch["inputs"], batch["segment_ids"], 2)
    blocks = jax.tree.map(lambda x: x[-1], nnx.split(teacher.stacks[0].blocks)[1])
    [last] = nnx.merge(nnx.split(teacher.stacks[0].blocks)[0], blocks)
    assert inputs.shape == (2, 2, 24, 16)
    close(outputs[-1], jax.jit(lambda mixer, x, ids: mixer(x, ids))(last.mixer, inputs[-1], batch["segment_ids"]))


def test_adapters_learn_within_swapped_layers(student):
    effort = training.Effort(transfer_steps=0, lora_steps=30, rank=2, lora_lr=1e-2)
    steps = list(training.adapt(student, lambda _: batches(0), effort))
    assert steps[-1][1] < steps[0][1]
    before, after = (lora.by_path(nnx.state(model)) for model in (student, steps[-1][0]()))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    projections = {f"stacks/1/blocks/0/mixer/{name}/kernel" for name in ("qkv", "out_proj")}
    assert changed == projections | set(training.new_paths(nnx.state(student)))
    thin = 2 * 2 * (16 + 32 + 16 + 16)
    assert training.parameters_trained(student, effort) == thin + sum(
        before[path].size for path in changed - projections
    )


@pytest.fixture(scope="module")
def smollm2():
    """Return a model of as many layers of the same attention, with narrow heads."""
    config = LMConfig(settings.SETTINGS["attention"], d_model=18, mlp_dim=8, vocab_size=24, scan_layers=True)
    return LM(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", {**settings.SETTINGS, **settings.UNTRAINED})
def test_a_setting_that_is_timed_is_what_is_trained(name, smollm2):
    """The layers that `speed` decodes with are those that `run` swaps."""
    layers = settings.get_config(name).model.layers
    swapped = linearize.swapped(smollm2, layers).config.layers
    timed, trained = ([(kind, mixer_class(kind).Config(**options)) for kind, options in x] for x in (layers, swapped))
    assert timed == trained and len(timed) == linearize.LAYERS


def test_an_unknown_setting_is_told(capsys):
    assert linearize.main(["run", "--only=all_w65"]) == 2
    assert "--only has 'all_w65'; settings are attention" in capsys.readouterr().err
