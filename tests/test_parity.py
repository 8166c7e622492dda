"""Every mixer and model equals its published definition, by arrays that the public PyTorch code computed.

The files stand in tests/parity; a file's `meta` names its source. Errors are relative to max(1, max|reference|).
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax import convert
from based_jax.evals.generate import generate
from based_jax.nn import layers
from based_jax.nn.lm import LM, LMConfig
from based_jax.ops import taylor
from based_jax.optim import decay_groups
from based_jax.train.step import loss_sums

FOLDER = Path(__file__).parent / "parity"
FORWARD, GRADIENT, LOGITS = 1e-5, 1e-4, 5e-5

BASED_LAYERS = (
    ("conv", {}),
    ("taylor", {"num_heads": 4, "feature_dim": 16}),
    ("window", {"num_heads": 4, "window": 9}),
) * 2
MIXERS = {
    "linear_attention_a": ("taylor", {"num_heads": 4, "feature_dim": 16}),
    "linear_attention_b": ("taylor", {"num_heads": 3, "feature_dim": 8}),
    "zoology_based_taylor_exp": ("taylor", {"num_heads": 2, "feature_dim": 16}),
    "sliding_attention_a": ("window", {"num_heads": 4, "window": 5}),
    "sliding_attention_b": ("window", {"num_heads": 1, "window": 9}),
    "zoology_sliding": ("window", {"num_heads": 1, "window": 9, "rotary_fraction": 0.0, "bias": True}),
    "zoology_mha": ("attention", {"num_heads": 2, "rotary_fraction": 0.0, "bias": True}),
    "base_conv_a": ("conv", {}),
    "zoology_base_conv_short": ("base_conv", {}),
}
IMPLS = {
    "taylor": ("xla", "recurrent", "oracle"),
    "window": ("xla", "recurrent", "oracle"),
    "attention": ("xla", "oracle"),
    "conv": ("xla", "recurrent", "oracle"),
    "base_conv": ("xla", "recurrent", "oracle"),
}
LMS = {
    "tiny_based_lm": LMConfig(BASED_LAYERS, d_model=64, vocab_size=97, mlp_dim=256, dtype="float32"),
    "tiny_attn_lm_even": LMConfig(
        (("attention", {"num_heads": 4}),) * 3,
        d_model=64,
        vocab_size=97,
        pad_vocab_multiple=16,
        mlp_dim=256,
        dtype="float32",
    ),
    "zoology_lm_based": LMConfig(
        (("base_conv", {}), ("taylor", {"num_heads": 1, "feature_dim": 8})),
        d_model=32,
        vocab_size=128,
        mlp="identity",
        norm="layer",
        dtype="float32",
    ),
}


def load(name):
    """Return (inputs, weights, outputs, gradients) of a file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return tuple(
            {key.removeprefix(group): file[key] for key in file.files if key.startswith(group)}
            for group in ("in.", "w.", "out.", "grad.")
        )


def assert_close(ours, reference, tolerance, what=""):
    error = np.abs(np.asarray(ours, np.float64) - reference).max() / max(1.0, np.abs(reference).max())
    assert error <= tolerance, f"{what}: relative error {error:.2e} is above {tolerance:.0e}"


def reference_gradients(kind, gradients, **options):
    """Return parameter gradients under our paths: they transform like the weights."""
    return nnx.state(convert.mixer_from_reference(kind, gradients, **options))


@pytest.mark.parametrize("name", ["taylor_exp_d8", "taylor_exp_d16"])
def test_feature_map(name):
    inputs, _, outputs, _ = load(name)
    assert_close(taylor.full_taylor_features(jnp.asarray(inputs["x"])), outputs["phi"], 1e-6)


@pytest.mark.parametrize(("name", "impl"), [(n, i) for n, (kind, _) in MIXERS.items() for i in IMPLS[kind]])
def test_mixer(name, impl):
    kind, options = MIXERS[name]
    inputs, weights, outputs, gradients = load(name)
    mixer = convert.mixer_from_reference(kind, weights, impl=impl, **options)
    graphdef, params = nnx.split(mixer)
    x, r = jnp.asarray(inputs["x"]), jnp.asarray(inputs["r"])

    def forward(params, x):
        y = nnx.merge(graphdef, params)(x)
        return jnp.sum(y * r), y

    (_, y), (grads, grad_x) = jax.jit(jax.value_and_grad(forward, (0, 1), has_aux=True))(params, x)
    assert_close(y, outputs["y"], FORWARD, "y")
    assert_close(grad_x, gradients.pop("x"), GRADIENT, "gradient of x")
    wanted = dict(nnx.to_flat_state(reference_gradients(kind, gradients, **options)))
    for path, leaf in nnx.to_flat_state(grads):
        assert_close(leaf[...], np.asarray(wanted[path][...]), GRADIENT, f"gradient of {path}")


@pytest.mark.parametrize(
    "name", ["linear_attention_a", "linear_attention_b", "sliding_attention_a", "sliding_attention_b", "base_conv_a"]
)
def test_prefill_then_decode(name):
    kind, options = MIXERS[name]
    inputs, weights, outputs, _ = load(name)
    mixer = convert.mixer_from_reference(kind, weights, **options)
    x = jnp.asarray(inputs["x"])
    with np.load(FOLDER / f"{name}.npz") as file:
        prefilled = json.loads(str(file["meta"]))["n_prefill"]
    y, cache = mixer.prefill(x[:, :prefilled], mixer.init_cache(x.shape[0], x.shape[1]))
    after_prefill, pieces = cache, [y]
    step = jax.jit(lambda x, cache: mixer.step(x, cache))
    for t in range(prefilled, x.shape[1]):
        y, cache = step(x[:, t], cache)
        pieces.append(y[:, None])
    assert_close(jnp.concatenate(pieces, axis=1), outputs["y_prefill_then_decode"], FORWARD)
    if kind == "taylor":
        assert_state(after_prefill, outputs["kv_state_after_prefill"], outputs["k_state_after_prefill"])
        assert_state(cache, outputs["kv_state_end"], outputs["k_state_end"])
    if kind == "conv":
        assert_close(np.moveaxis(np.asarray(cache), 1, 2), outputs["conv_state_end"], FORWARD)


def assert_state(state, kv, k):
    """Compare our state over distinct features with the reference's over all of them: it holds each product twice."""
    kv, k = kv[:, :, 0], k[:, :, 0]
    full = np.concatenate([kv, k], axis=2)  # (B, H, V+1, 1 + K + K^2)
    dim = int((np.sqrt(4 * full.shape[-1] - 3) - 1) / 2)
    rows, columns = np.tril_indices(dim)
    distinct = 1 + dim + rows * dim + columns
    weights = np.where(rows == columns, 1.0, np.sqrt(2.0))
    wanted = np.concatenate([full[..., : 1 + dim], full[..., distinct] * weights], axis=-1)
    assert_close(np.moveaxis(np.asarray(state), 2, 3), wanted, FORWARD, "state")


@pytest.mark.parametrize("impl", ["xla", "recurrent", "oracle"])
def test_core_in_float64_arrays(impl):
    inputs, _, outputs, _ = load("based_core_fp64")
    q, k, v = (jnp.asarray(inputs[name].swapaxes(1, 2), jnp.float32) for name in "qkv")
    o, state = taylor.taylor_attention(q, k, v, return_state=True, impl=impl)
    assert_close(o.swapaxes(1, 2), outputs["y"], FORWARD, "y")
    assert_state(state, outputs["kv_state"][:, :, None], outputs["k_state"][:, :, None, None])
    sums = jnp.einsum("BTHE,BHEV->BTHV", taylor.taylor_features(q)[:, -1:], state)
    assert_close(sums[:, 0, :, :-1], outputs["num"][:, :, -1], FORWARD, "num of the last token")
    assert_close(sums[:, 0, :, -1], outputs["z"][:, :, -1], FORWARD, "z of the last token")


@pytest.mark.parametrize("size", ["d8", "d16"])
@pytest.mark.parametrize("impl", ["xla", "recurrent", "oracle"])
def test_fla(size, impl):
    files = [f"fla_based_{size}_norm_a"] if size == "d8" else [f"fla_based_{size}_norm_{p}_a" for p in ("fwd", "bwd")]
    inputs, outputs, gradients = {}, {}, {}
    for name in files:
        more = load(name)
        inputs, outputs, gradients = inputs | more[0], outputs | more[2], gradients | more[3]
    q, k, v, r = (jnp.asarray(inputs[name].swapaxes(1, 2)) for name in ("q", "k", "v", "r"))

    def forward(q, k, v):
        o = taylor.taylor_attention(q, k, v, impl=impl)
        return jnp.sum(o * r), o

    (_, o), grads = jax.jit(jax.value_and_grad(forward, (0, 1, 2), has_aux=True))(q, k, v)
    assert_close(o.swapaxes(1, 2), outputs["y"], FORWARD, "y")
    for name, grad in zip("qkv", grads, strict=True):
        assert_close(grad.swapaxes(1, 2), gradients[name], GRADIENT, f"gradient of {name}")


@pytest.mark.parametrize("size", ["d8", "d16"])
def test_fla_without_normaliser(size):
    """The un-normalised sums are what the state gives before its last column divides: here token by token."""
    files = (
        [f"fla_based_{size}_nonorm_a"] if size == "d8" else [f"fla_based_{size}_nonorm_{p}_a" for p in ("fwd", "bwd")]
    )
    inputs, outputs, gradients = {}, {}, {}
    for name in files:
        more = load(name)
        inputs, outputs, gradients = inputs | more[0], outputs | more[2], gradients | more[3]
    q, k, v, r = (jnp.asarray(inputs[name].swapaxes(1, 2)) for name in ("q", "k", "v", "r"))

    def forward(q, k, v):
        products = jnp.einsum("BTHE,BTHV->BTHEV", taylor.taylor_features(k), v)
        o = jnp.einsum("BTHE,BTHEV->BTHV", taylor.taylor_features(q), jnp.cumsum(products, axis=1))
        return jnp.sum(o * r), o

    (_, o), grads = jax.jit(jax.value_and_grad(forward, (0, 1, 2), has_aux=True))(q, k, v)
    assert_close(o.swapaxes(1, 2), outputs["y"], FORWARD, "y")
    for name, grad in zip("qkv", grads, strict=True):
        assert_close(grad.swapaxes(1, 2), gradients[name], GRADIENT, f"gradient of {name}")


def test_mlp():
    inputs, weights, outputs, gradients = load("gated_mlp_base_default")
    hidden, width = weights["fc2.weight"].shape[::-1]
    mlp = layers.SwiGLU(width, hidden, std=0.02, out_std=0.02, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for name in ("fc1", "fc2"):
        getattr(mlp, name).kernel[...] = jnp.asarray(weights[f"{name}.weight"].T)
    x, r = jnp.asarray(inputs["x"]), jnp.asarray(inputs["r"])
    graphdef, params = nnx.split(mlp)
    grads, grad_x = jax.grad(lambda p, x: jnp.sum(nnx.merge(graphdef, p)(x) * r), (0, 1))(params, x)
    assert_close(mlp(x), outputs["y"], FORWARD)
    assert_close(grad_x, gradients["x"], GRADIENT)
    for name in ("fc1", "fc2"):
        assert_close(grads[name]["kernel"][...].T, gradients[f"{name}.weight"], GRADIENT)


def test_rms_norm():
    inputs, weights, outputs, gradients = load("rms_norm")
    norm = layers.rms_norm(weights["weight"].size, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(weights["weight"])
    x, r = jnp.asarray(inputs["x"]), jnp.asarray(inputs["r"])
    graphdef, params = nnx.split(norm)
    grads, grad_x = jax.grad(lambda p, x: jnp.sum(nnx.merge(graphdef, p)(x) * r), (0, 1))(params, x)
    assert_close(norm(x), outputs["y"], 1e-6)
    assert_close(grad_x, gradients["x"], 1e-5)
    assert_close(grads["scale"][...], gradients["weight"], 1e-5)


def lm_of(name, scan_layers=False):
    inputs, weights, outputs, gradients = load(name)
    config = LMConfig(**{**vars(LMS[name]), "scan_layers": scan_layers})
    return convert.lm_from_reference(weights, config), inputs, outputs, gradients


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", LMS)
def test_language_model(name, scan_layers):
    model, inputs, outputs, gradients = lm_of(name, scan_layers)
    graphdef, params = nnx.split(model)
    ids = jnp.asarray(inputs["ids"])
    batch = {"inputs": ids, "labels": jnp.asarray(inputs["labels"])} if "labels" in inputs else None
    batch = batch or {"inputs": ids[:, :-1], "labels": ids[:, 1:]}

    def loss(params):
        sums = loss_sums(nnx.merge(graphdef, params), batch)
        return sums["loss"] / sums["count"]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(model(ids), outputs["logits"], LOGITS, "logits")
    assert_close(value, outputs["loss"], FORWARD, "loss")
    if "hidden" in outputs:
        assert_close(model.hidden(ids), outputs["hidden"], FORWARD, "hidden")
    wanted = dict(nnx.to_flat_state(nnx.state(convert.lm_from_reference(gradients, model.config))))
    for path, leaf in nnx.to_flat_state(grads):
        assert_close(leaf[...], np.asarray(wanted[path][...]), GRADIENT, f"gradient of {path}")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_language_model_decode(scan_layers):
    model, inputs, outputs, _ = lm_of("tiny_based_lm", scan_layers)
    ids = jnp.asarray(inputs["ids"])
    hidden, cache = model.prefill(ids[:, :24], model.init_cache(2, 40))
    pieces = [model.logits(hidden)]
    step = jax.jit(lambda ids, cache: model.step(ids, cache))
    for t in range(24, 40):
        hidden, cache = step(ids[:, t], cache)
        pieces.append(model.logits(hidden)[:, None])
    assert_close(jnp.concatenate(pieces, axis=1), outputs["logits_prefill_then_decode"], LOGITS)
    prompt = outputs["greedy8"].shape[1] - 8
    new = generate(model, list(outputs["greedy8"][:, :prompt]), 8)
    np.testing.assert_array_equal(np.stack(new), outputs["greedy8"][:, prompt:])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_weight_decay_groups(scan_layers):
    model, *_ = lm_of("tiny_based_lm", scan_layers)
    groups = json.loads((FOLDER / "tiny_based_lm_weight_decay_groups.json").read_text())
    keys = convert.reference._lm_keys(model, "based", None)
    ours = decay_groups(nnx.state(model, nnx.Param), "reference")
    for paths, group in zip(ours, ("decay", "no_decay"), strict=True):
        assert sorted(key for path in paths for key in keys[path]) == sorted(groups[group])


def test_initial_values_of_zoology():
    with np.load(FOLDER / "zoology_lm_based.npz") as file:
        wanted = json.loads(str(file["meta"]))["init_std"]
    weights = load("zoology_lm_based")[1]
    model = LM(LMS["zoology_lm_based"], rngs=nnx.Rngs(0))
    for path, (key,) in convert.reference._lm_keys(model, "zoology", weights).items():
        leaf = dict(("/".join(map(str, p)), v) for p, v in nnx.to_flat_state(nnx.state(model)))[path]
        if "out_proj" not in path:  # zoology's name for it, proj_o, escapes its own rescaling
            tolerance = 3 * wanted[key] / np.sqrt(2 * leaf.size) + 3 * wanted[key] / np.sqrt(2 * weights[key].size)
            assert abs(float(jnp.std(leaf[...])) - wanted[key]) <= tolerance, path


CHECKPOINTS = {
    "based-360m": (27, range(1, 22, 5), 1024, 16, 2048, 8),
    "based-1b-50b": (36, (1, 6, 11, 16, 21, 27, 33), 1792, 16, 3584, 8),
    "attn-360m": (24, None, 1024, 16, 2816, 16),
    "attn-1b(multiple_of=256)": (36, None, 1680, 24, 4608, 16),
    "attn-1b(multiple_of=128)": (36, None, 1680, 24, 4480, 16),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_released_shapes(name):
    depth, taylor_layers, width, heads, hidden, multiple = CHECKPOINTS[name]

    def kind(i):
        if taylor_layers is None:
            return "attention", {"num_heads": heads}
        return ("taylor" if i in taylor_layers else "window" if i - 1 in taylor_layers else "conv"), {}

    config = LMConfig(tuple(map(kind, range(depth))), width, mlp_dim=hidden, pad_vocab_multiple=multiple)
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    released = json.loads((FOLDER / "checkpoint_shapes.json").read_text())[name]
    assert model.num_params() == released["params_tied"]
    keys = convert.reference._lm_keys(model, "based", None)
    assert {key for names in keys.values() for key in names} | {convert.reference.HEAD} == set(released["state_dict"])
    for path, variable in convert.reference._flat(model).items():
        reference_shape = convert.reference._to_reference(path, np.empty(variable.shape, np.bool_)).shape
        assert list(reference_shape) == released["state_dict"][keys[path][0]], path


def test_save_and_load_are_the_identity(tmp_path):
    model, inputs, *_ = lm_of("tiny_based_lm", scan_layers=True)
    convert.save_hf(model, tmp_path / "hf")
    again = convert.load_hf(tmp_path / "hf", dtype="float32")
    assert again.config.layers[1][1]["feature_dim"] == 16
    for ours, theirs in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ids = jnp.asarray(inputs["ids"])
    np.testing.assert_array_equal(model(ids), again(ids))
