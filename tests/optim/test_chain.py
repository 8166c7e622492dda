import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from based_jax import optim
from based_jax.errors import UserError
from based_jax.nn.layers import NORMS
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS
from based_jax.optim import OptimConfig

RUNS = {"10b": (20_000, 200), "30b": (60_000, 600), "50b": (100_000, 1_000)}


def timm(step, steps, warmup, peak=8e-4):
    """CosineLRScheduler with warmup_prefix, as HazyResearch/based calls it."""
    if step < warmup:
        return 1e-6 + step * (peak - 1e-6) / warmup
    return 8e-5 + (peak - 8e-5) / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def torch_cosine(step, epochs, per_epoch, peak):
    """CosineAnnealingLR with eta_min 0, stepped after each epoch, as zoology calls it."""
    return peak * (1 + math.cos(math.pi * (step // per_epoch) / epochs)) / 2


@pytest.mark.parametrize("run", RUNS)
def test_schedule_equals_the_reference_runs(run):
    steps, warmup = RUNS[run]
    lr = jax.jit(optim.schedule(OptimConfig(warmup_steps=warmup), steps))
    for step in (0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, steps // 2, steps - 1, steps):
        assert abs(float(lr(step)) - timm(step, steps, warmup)) < 1e-9, step


def test_schedule_has_the_published_values_of_the_10b_run():
    lr = optim.schedule(OptimConfig(), 20_000)
    published = {0: 1e-6, 100: 4.005e-4, 200: 8e-4, 10_000: 4.457e-4, 20_000: 8e-5, 30_000: 8e-5}
    for step, value in published.items():
        assert float(lr(step)) == pytest.approx(value, abs=6e-8), step


def test_t_initial_fixes_the_decay_whatever_the_length_of_the_run():
    lr = optim.schedule(OptimConfig(t_initial=100), 50)
    assert float(lr(300)) == pytest.approx(8e-5, abs=1e-9)
    assert float(lr(250)) == pytest.approx(4.4e-4, abs=1e-9)


def test_no_warmup_starts_at_the_peak():
    assert float(optim.schedule(OptimConfig(warmup_steps=0), 10)(0)) == pytest.approx(8e-4, abs=1e-9)


@pytest.mark.parametrize("steps", [36, 40])
def test_cosine_per_epoch_is_constant_inside_an_epoch(steps):
    """A last epoch that is cut short counts as one; the rate is 0 after it, where torch's rises again."""
    lr = optim.schedule(OptimConfig(lr=1e-3, schedule="cosine_per_epoch", steps_per_epoch=5), steps)
    expected = [torch_cosine(step, 8, 5, 1e-3) for step in range(steps)]
    np.testing.assert_allclose([lr(step) for step in range(steps)], expected, rtol=0, atol=1e-9)
    assert [float(lr(step)) for step in (40, 44, 45, 80)] == [0] * 4


PEAKS = [0.0, 1e-4, 8e-4, 2e-3]
FORMULAS = {
    "warmup_cosine": (OptimConfig(warmup_steps=7), lambda step, peak: timm(step, 40, 7, peak)),
    "cosine_per_epoch": (
        OptimConfig(schedule="cosine_per_epoch", steps_per_epoch=5),
        lambda step, peak: torch_cosine(step, 8, 5, peak),
    ),
    "constant": (OptimConfig(schedule="constant"), lambda step, peak: peak),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("x64", "rtol", "atol"), [(True, 1e-9, 0), (False, 0, 1e-9)])
def test_a_traced_peak_gives_the_formula(name, x64, rtol, atol):
    """To nine digits in double precision; in single precision the rest is rounding."""
    config, formula = FORMULAS[name]
    with jax.enable_x64(x64):
        rates = jax.jit(jax.vmap(lambda peak: jax.vmap(optim.schedule(config, 40, peak))(jnp.arange(40))))
        found = np.asarray(rates(jnp.asarray(PEAKS)))
    expected = [[formula(step, peak) for step in range(40)] for peak in PEAKS]
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_rate_is_a_scalar_array(name):
    for step in (0, jnp.int32(12)):
        rate = optim.schedule(FORMULAS[name][0], 40)(step)
        assert isinstance(rate, jax.Array) and (rate.shape, rate.dtype) == ((), jnp.float32)


def test_constant():
    lr = optim.schedule(OptimConfig(lr=3e-3, schedule="constant"), 4)
    assert float(lr(0)) == float(lr(3)) == pytest.approx(3e-3, abs=1e-9)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 4, rngs=rngs)
        self.norm = nnx.RMSNorm(4, rngs=rngs)
        self.centred = nnx.LayerNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.A_log = nnx.Param(jnp.ones(3))
        self.D = nnx.Param(jnp.ones(3))
        self.conv_kernel = nnx.Param(jnp.ones(3))


def params_of(kind):
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    return {"state": state, "dict": nnx.to_pure_dict(state)}[kind]


GROUP_NORMED = ("rwkv5", "rwkv6", "rwkv7")
KERNELS = ["conv_kernel", "layers/0/kernel", "layers/1/kernel"]


@pytest.mark.parametrize("kind", ["state", "dict"])
def test_decay_groups_by_path(kind):
    decayed, others = optim.decay_groups(params_of(kind), "reference")
    biases = ["centred/bias", "layers/0/bias", "layers/1/bias"]
    assert decayed == [*KERNELS, "norm/scale"]
    assert others == sorted(["A_log", "D", "embed/embedding", "centred/scale", *biases])
    assert optim.decay_groups(params_of(kind), "kernels") == (KERNELS, sorted([*others, "norm/scale"]))
    assert optim.decay_groups(params_of(kind), "all") == (sorted(decayed + others), [])


def test_a_parameter_of_no_group_is_named():
    params = params_of("dict") | {"layer": {"Delta": jnp.ones(3)}}
    with pytest.raises(UserError, match=r"Parameter 'layer/Delta' is in none of optim.PARAMETER_GROUPS"):
        optim.optimizer(OptimConfig(decay="all"), 300).init(params)


def model_params(layers, norm):
    config = LMConfig(layers=layers, d_model=256, norm=norm, embed_norm=True, tie_embeddings=False)
    return nnx.state(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))), nnx.Param)


def test_every_mixer_s_parameters_are_of_a_group_and_group_norms_do_not_decay():
    options = {"attention": {"bias": True}, "gla": {"conv_size": 4}, "linear": {"feature_map": "hedgehog"}}
    params = model_params(tuple((kind, options.get(kind, {})) for kind in MIXERS), "layer")
    decayed, exempt = optim.decay_groups(params, "reference")
    group_norms = {f"stacks/{list(MIXERS).index(kind)}/blocks/0/mixer/norm/scale" for kind in GROUP_NORMED}
    assert {path for path in exempt if "mixer" in path and path.endswith("/scale")} == group_norms
    kernels, _ = optim.decay_groups(params, "kernels")
    assert kernels == sorted(path for path in [*decayed, *exempt] if path.endswith("kernel"))


@pytest.mark.parametrize("norm", NORMS)
def test_layer_norms_do_not_decay_and_rms_norms_do(norm):
    decayed, exempt = optim.decay_groups(model_params((("rwkv4", {}),), norm), "reference")
    scales = ["embed_norm/scale", "norm/scale", *(f"stacks/0/blocks/0/norm{i}/scale" for i in (1, 2))]
    assert set(scales) <= set(decayed if norm == "rms" else exempt)


def test_no_two_groups_have_a_pattern_in_common():
    patterns = [pattern for group in optim.PARAMETER_GROUPS.values() for pattern in group]
    assert len(patterns) == len(set(patterns)) and not any("*" in pattern for pattern in patterns)


def test_stacking_layers_changes_no_group():
    params = nnx.to_pure_dict(params_of("state"))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    assert optim.decay_groups(stacked, "reference") == optim.decay_groups(params, "reference")


@pytest.mark.parametrize("kind", ["state", "dict"])
def test_update_shrinks_exactly_the_decayed_parameters(kind):
    params = jax.tree.map(jnp.ones_like, params_of(kind))
    tx = optim.optimizer(OptimConfig(lr=0.5, schedule="constant", weight_decay=0.1), 10)

    @jax.jit
    def step(params, opt):
        updates, opt = tx.update(jax.tree.map(jnp.zeros_like, params), opt, params)
        return optax.apply_updates(params, updates), opt

    after, _ = step(params, tx.init(params))
    decayed, _ = optim.decay_groups(params, "reference")
    for keys, leaf in jax.tree_util.tree_leaves_with_path(after):
        expected = 0.95 if optim.path_of(keys) in decayed else 1.0
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=optim.path_of(keys))


def adamw_by_hand(w, grads, config, lr):
    m = v = np.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        g = g * min(1.0, config.clip_norm / np.linalg.norm(g))
        m = config.betas[0] * m + (1 - config.betas[0]) * g
        v = config.betas[1] * v + (1 - config.betas[1]) * g**2
        step = (m / (1 - config.betas[0] ** t)) / (np.sqrt(v / (1 - config.betas[1] ** t)) + config.eps)
        w = w - lr(t - 1) * (step + config.weight_decay * w)
    return w


def test_adamw_equals_its_formula():
    config = OptimConfig(lr=0.1, warmup_steps=2, warmup_lr=0.01, final_lr=0.001)
    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=(3, 4)), rng.normal(size=(6, 3, 4))
    tx = optim.optimizer(config, 6)
    params = {"kernel": w.astype(np.float32)}
    opt, update = tx.init(params), jax.jit(tx.update)
    for g in grads.astype(np.float32):
        updates, opt = update({"kernel": g}, opt, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        params["kernel"], adamw_by_hand(w, grads, config, optim.schedule(config, 6)), rtol=1e-5, atol=1e-6
    )


def test_the_state_of_adamw_has_the_paths_that_checkpoints_have():
    state = optim.optimizer(OptimConfig(), 300).init({"kernel": jnp.ones(2)})
    paths = [optim.path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == ["1/count", "1/mu/kernel", "1/nu/kernel", "3/count"]


def test_clip_norm_none_leaves_gradients_alone():
    config = OptimConfig(schedule="constant", clip_norm=None)
    params = {"kernel": jnp.ones(2)}
    tx = optim.optimizer(config, 1)
    _, opt = tx.update({"kernel": jnp.array([3e3, 4e3])}, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.get(opt, "mu")["kernel"], [3e2, 4e2], rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"schedule": "cosine"}, "Unknown schedule 'cosine': did you mean"),
        ({"decay": "none"}, "Unknown decay 'none'"),
        ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0)"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": math.inf}, "weight_decay is inf; it is at least 0, and finite."),
        ({"t_initial": 0}, "t_initial is 0"),
    ],
)
def test_bad_values_are_named_at_construction(bad, message):
    with pytest.raises(UserError) as error:
        OptimConfig(**bad)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        (OptimConfig(), 100, "optim.warmup_steps is 200, but the run has 100 steps"),
        (OptimConfig(schedule="cosine_per_epoch"), 100, "optim.schedule 'cosine_per_epoch' needs steps_per_epoch"),
        (OptimConfig(), 0, "steps is 0"),
    ],
)
def test_a_schedule_that_does_not_fit_is_named(config, steps, message):
    with pytest.raises(UserError, match=message):
        optim.optimizer(config, steps)
