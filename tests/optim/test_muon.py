"""Muon: what is made orthogonal, and how, and which parameters it leaves to AdamW."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from based_jax import config as configs
from based_jax import optim
from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import MIXERS
from based_jax.optim import OptimConfig, chain
from based_jax.optim.config import NAMES
from based_jax.optim.muon import NEWTON_SCHULZ, orthogonalized
from based_jax.train.step import initial_state, make_train_step

CONFIG = OptimConfig(lr=0.1, schedule="constant", weight_decay=0.0, clip_norm=None, name="muon")


def by_singular_values(x, steps=5):
    """The iteration's odd polynomial of each matrix's singular values, which it scales to a norm of 1, in fp64."""
    u, s, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    for _ in range(steps):
        s = sum(c * s**power for c, power in zip(NEWTON_SCHULZ, (1, 3, 5), strict=True))
    return (u * s[..., None, :]) @ v, s


def update_by_hand(matrices, momentum=0.95, rms=0.2):
    """The direction after some gradients of a matrix: Nesterov's, orthogonal, of one size whatever the shape."""
    total = np.zeros_like(matrices[0])
    for g in matrices:
        total = g + momentum * total
        ahead = g + momentum * total
    return by_singular_values(ahead)[0] * rms * np.sqrt(max(ahead.shape[-2:]))


def params_of(**kernels):
    """Return a state of one layer for each kernel, its array with the parts that it joins."""
    layer = {
        name: {"kernel": nnx.Param(jnp.asarray(x), **layers.logical_axes("embed", "mlp", parts=parts))}
        for name, (x, parts) in kernels.items()
    }
    return nnx.State(layer)


@pytest.mark.parametrize("shape", [(5, 7), (9, 4), (3, 8, 8), (2, 3, 7, 5)])
def test_each_matrix_becomes_orthogonal(shape, rng):
    x = rng.normal(size=shape) * rng.uniform(1e-3, 1e3, size=(*shape[:-2], 1, 1))
    expected, singular = by_singular_values(x)
    assert singular.max() < 1.3
    [found] = jax.jit(lambda x: orthogonalized([x], [("embed", "mlp")], 5))(x.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_no_gradient_is_no_update():
    np.testing.assert_array_equal(orthogonalized([jnp.zeros((2, 3, 4))], [("embed", "mlp")], 5)[0], 0)


def test_layers_that_are_stacked_and_maps_that_are_joined_have_their_own_update(rng):
    """Three layers of queries, keys and values of 8, 4 and 4 components."""
    grads, parts = rng.normal(size=(3, 3, 6, 16)), (8, 4, 4)
    tx = optim.optimizer(CONFIG, 10)
    params = params_of(qkv=(np.zeros((3, 6, 16), np.float32), parts))
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = update(params_of(qkv=(np.asarray(g, np.float32), parts)), state, params)
    found = np.asarray(updates["qkv"]["kernel"][...]) / -CONFIG.lr
    for layer, (begin, end) in itertools.product(range(3), itertools.pairwise((0, 8, 12, 16))):
        expected = update_by_hand([g[layer, :, begin:end] for g in grads])
        np.testing.assert_allclose(found[layer, :, begin:end], expected, atol=2e-3)


ADAMW_KERNELS = {"head/kernel"} | {
    f"{kind}/{name}/kernel"
    for kind, names in {
        "hyena": ("filter/hidden/0", "filter/hidden/1", "filter/hidden/2", "filter/out"),
        "implicit_conv": ("hidden", "out"),
        "linear": ("feature_map/proj_1", "feature_map/proj_2"),
        "rwkv6": ("shift_down", "shift_up"),
    }.items()
    for name in names
}
JOINED = {
    "attention": {"qkv": 3},
    "conv": {"in_proj": 2},
    "deltanet": {"qkv": 3},
    "gated_deltanet": {"qkv": 3},
    "gla": {"qkv": 3},
    "gsa": {"qkv": 3},
    "hgrn2": {"qkv": 3},
    "hyena": {"in_proj": 3},
    "kda": {"qkv": 3},
    "lightning": {"qkv": 3},
    "mamba": {"in_proj": 2, "x_proj": 3},
    "mamba2": {"in_proj": 5},
    "retnet": {"qkv": 3},
    "simple_gla": {"qkv": 3},
    "taylor_window": {"qkv": 3},
    "window": {"qkv": 3},
}


def every_mixer():
    """Return the parameters of a model that has every mixer once, and those of a learned feature map."""
    options = {"attention": {"bias": True}, "gla": {"conv_size": 4}, "linear": {"feature_map": "all_poly"}}
    config = LMConfig(tuple((kind, options.get(kind, {})) for kind in MIXERS), 256, tie_embeddings=False)
    return nnx.state(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))), nnx.Param)


def named(path):
    """Return a path with the mixer's name in place of its layer: 'conv/in_proj/kernel', 'conv/mlp/fc1/kernel'."""
    if not path.startswith("stacks/"):
        return path
    _, layer, _, _, *rest = path.split("/")
    return "/".join([list(MIXERS)[int(layer)], *(rest[1:] if rest[0] == "mixer" else rest)])


def test_every_parameter_has_its_optimizer():
    """Muon has the kernels inside the layers of every mixer; embedding, head, norms, biases, taps and decays AdamW."""
    muon, adamw = (set(map(named, paths)) for paths in optim.muon_groups(every_mixer()))
    kernels = {path for path in muon | adamw if path.endswith("/kernel")}
    assert adamw & kernels == ADAMW_KERNELS
    assert muon == kernels - ADAMW_KERNELS
    assert {path.split("/")[0] for path in muon if "/mlp/" not in path} == set(MIXERS)
    assert {"embed/embedding", "norm/scale", "mamba/A_log", "conv/conv_kernel", "attention/qkv/bias"} <= adamw


def test_what_is_joined_in_one_kernel_is_known():
    """Its widths make up the kernel's."""
    leaves = jax.tree_util.tree_leaves_with_path(every_mixer(), is_leaf=optim.is_variable)
    parts = {named(optim.path_of(keys)): leaf.get_metadata().get("parts", ()) for keys, leaf in leaves}
    widths = {named(optim.path_of(keys)): leaf.get_value().shape[-1] for keys, leaf in leaves}
    joined = {path: len(found) for path, found in parts.items() if found and "/mlp/" not in path}
    assert joined == {f"{kind}/{name}/kernel": n for kind, names in JOINED.items() for name, n in names.items()}
    assert all(sum(found) == widths[path] for path, found in parts.items() if found)
    assert {parts[f"{kind}/mlp/fc1/kernel"] for kind in MIXERS} == {(512, 512)}


def model(scan_layers):
    config = LMConfig((("conv", {}),) * 2, 16, vocab_size=32, dtype="float32", scan_layers=scan_layers)
    return LM(config, rngs=nnx.Rngs(0))


def unstacked(scanned, like):
    """Return the parameters of a model that is one scanned layer as those of `like`, whose layers stand alone."""
    by_path = {optim.path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(scanned)}

    def leaf(keys, x):
        top, *rest = optim.path_of(keys).split("/")
        stacked = by_path["/".join([top, "0", *rest[1:]]) if top == "stacks" else "/".join([top, *rest])]
        return stacked[int(rest[0])] if top == "stacks" else stacked

    return jax.tree_util.tree_map_with_path(leaf, like)


def test_a_scanned_model_learns_what_an_unscanned_one_does(rng, close):
    inputs, labels = rng.integers(32, size=(2, 4, 8), dtype=np.int32)
    tx, after = optim.optimizer(CONFIG, 10), {}
    scanned, plain = model(True), model(False)
    nnx.update(plain, unstacked(nnx.state(scanned, nnx.Param), nnx.state(plain, nnx.Param)))
    for name, found in {"scanned": scanned, "plain": plain}.items():
        step, state = jax.jit(make_train_step(nnx.graphdef(found), tx)), initial_state(found, tx)
        for _ in range(2):
            state, _ = step(state, {"inputs": inputs, "labels": labels})
        after[name] = state.params
    close(unstacked(after["scanned"], after["plain"]), after["plain"], tolerance=1e-3)


def test_rates_may_be_lanes_of_a_program(rng):
    """As those of a sweep are: learning rate and weight decay enter as arrays."""
    params = params_of(kernel=(rng.normal(size=(4, 6)).astype(np.float32), ()))

    def after(lr, weight_decay):
        tx = optim.optimizer(CONFIG, 10, lr=lr, weight_decay=weight_decay)
        updates, _ = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates)["kernel"]["kernel"][...]

    lr, decay = np.float32([0.1, 0.3]), np.float32([0.0, 0.5])
    lanes = jax.jit(jax.vmap(after))(lr, decay)
    x = np.asarray(params["kernel"]["kernel"][...])
    direction = x - np.asarray(jax.jit(after)(1.0, 0.0))
    for lane in range(2):
        expected = x - lr[lane] * (direction + decay[lane] * x)
        np.testing.assert_allclose(lanes[lane], expected, atol=1e-5)


def test_each_name_has_a_direction():
    assert set(chain.DIRECTIONS) == set(NAMES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "mun"}, "Unknown name 'mun' (optim.name): did you mean 'muon'?"),
        ({"moment_dtype": "float16"}, "Unknown moment_dtype 'float16' (optim.moment_dtype): did you mean 'bfloat16'?"),
        ({"muon": {"momentum": 1.0}}, "optim.muon.momentum is 1.0; it is at least 0 and below 1."),
        ({"muon": {"steps": 0}}, "optim.muon.steps is 0; it is between 1 and 20."),
        ({"muon": {"update_rms": 0.0}}, "optim.muon.update_rms is 0.0; it is above 0, and finite."),
        ({"muon": {"beta": 0.9}}, "Unknown config key 'optim.muon.beta'"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(UserError) as error:
        configs.build(OptimConfig, values, "optim")
    assert message in str(error.value)
