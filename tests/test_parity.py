"""Every mixer and model equals its published definition, by arrays that the public PyTorch code computed.

The files stand in tests/parity; a file's `meta` names its source. Errors are relative to max(1, max|reference|).
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.decoding import in_one_pass, prefill_then_step
from helpers.reference_cases import FOLDER, FORWARD, GRADIENT, LOGITS, POINTWISE, assert_close, load

from based_jax import config as configs
from based_jax import convert
from based_jax.convert.reference import SKELETONS, reference_keys, reference_shapes
from based_jax.generate import generate
from based_jax.labels import NO_LABEL
from based_jax.nn import layers
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.loss import loss_sums
from based_jax.nn.mixers import MIXERS as KINDS
from based_jax.ops import taylor
from based_jax.ops.dispatch import named
from based_jax.ops.wkv4 import wkv4
from based_jax.optim import decay_groups

CONFIGS = Path(__file__).parents[1] / "configs"

FC = ("fc1", "fc2")
IMPLS = ("oracle", "xla_steps", "xla")
RWKV7 = {"decay_low_rank_dim": 6, "gate_low_rank_dim": 8, "a_low_rank_dim": 5, "v_low_rank_dim": 4}
BASED, ZOOLOGY = convert.window_from_based, convert.window_from_zoology
NO_ROTARY = {"rotary_fraction": 0.0, "bias": True}
MIXERS = {
    "linear_attention_a": ("taylor", {"num_heads": 4, "feature_dim": 16}),
    "linear_attention_b": ("taylor", {"num_heads": 3, "feature_dim": 8}),
    "sliding_attention_a": ("window", {"num_heads": 4, "window": BASED(8)}),
    "sliding_attention_b": ("window", {"num_heads": 1, "window": BASED(16)}),
    "base_conv_a": ("conv", {}),
    "zoology_based_taylor_exp": ("taylor", {"num_heads": 2, "feature_dim": 16}),
    "zoology_based_ReLU": ("linear", {"num_heads": 2, "feature_map": "relu"}),
    "zoology_based_pos_elu": ("linear", {"num_heads": 2, "feature_map": "elu"}),
    "prefix_linear_attention_a": ("prefix", {"num_heads": 4, "enc_length": 16}),
    "fla_retention_layer_a": ("retnet", {"num_heads": 4}),
    "fla_kda_layer_a": ("kda", {"num_heads": 2, "head_dim": 8}),
    "zoology_delta_net": ("deltanet", {"num_heads": 2}),
    "fla_rwkv6_layer_a": ("rwkv6", {"num_heads": 2, "proj_low_rank_dim": 4, "gate_low_rank_dim": 8}),
    "fla_rwkv7_layer_l0_a": ("rwkv7", {"head_dim": 16, **RWKV7}),
    "zoology_rwkv7_a": ("rwkv7", {"head_dim": 16, **RWKV7}),
    "zoology_rwkv5_a": ("rwkv5", {"head_size": 16}),
    "hf_rwkv4_time_mix_a": ("rwkv4", {}),
    "fla_gsa_layer_a": ("gsa", {"num_heads": 2, "num_slots": 8}),
    "fla_simple_gla_layer_a": ("simple_gla", {"num_heads": 2}),
    "fla_hgrn2_layer_a": ("hgrn2", {"expand_ratio": 16}),
    "zoology_gla": ("gla", {"num_heads": 2}),
    "zoology_h3_init": ("h3", {"d_state": 8, "head_dim": 2}),
    "zoology_hyena": ("hyena", {"l_max": 24}),
    "zoology_mamba2_init": ("mamba2", {"d_state": 8, "headdim": 16}),
    "zoology_sliding": ("window", {"num_heads": 1, "window": ZOOLOGY(8), **NO_ROTARY}),
    "zoology_mha": ("attention", {"num_heads": 2, **NO_ROTARY}),
    "zoology_base_conv_short": ("base_conv", {}),
}
LMS = {
    "tiny_based_lm": LMConfig(
        (
            ("conv", {}),
            ("taylor", {"num_heads": 4, "feature_dim": 16}),
            ("window", {"num_heads": 4, "window": BASED(16)}),
        )
        * 2,
        d_model=64,
        vocab_size=97,
        mlp_dim=256,
        dtype="float32",
    ),
    "tiny_attn_lm_even": LMConfig(
        (("attention", {"num_heads": 4}),) * 3,
        d_model=64,
        vocab_size=97,
        pad_vocab_multiple=16,
        mlp_dim=256,
        dtype="float32",
    ),
    "hf_llama_a": LMConfig(
        (("attention", {"num_heads": 4, "num_kv_heads": 2, "rotary_fraction": 1.0}),) * 2,
        d_model=32,
        vocab_size=61,
        pad_vocab_multiple=1,
        mlp_dim=64,
        tie_embeddings=False,
        dtype="float32",
    ),
    "tiny_mamba_lm": LMConfig(
        (("mamba", {}),) * 3, d_model=32, vocab_size=97, pad_vocab_multiple=16, mlp="none", dtype="float32"
    ),
    "hf_mamba_a": LMConfig(
        (("mamba", {"d_state": 8}),) * 2,
        d_model=32,
        vocab_size=61,
        pad_vocab_multiple=1,
        mlp="none",
        dtype="float32",
    ),
    "hf_rwkv4_lm_a": LMConfig(
        (("rwkv4", {}), ("rwkv4_channel_mix", {"expand": 2.0})) * 2,
        d_model=32,
        vocab_size=61,
        pad_vocab_multiple=1,
        mlp="none",
        norm="layer",
        embed_norm=True,
        tie_embeddings=False,
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
STACKED = [("tiny_based_lm", False), ("tiny_based_lm", True), ("tiny_attn_lm_even", True), ("zoology_lm_based", False)]
STACKED += [("hf_llama_a", True), ("tiny_mamba_lm", False), ("hf_mamba_a", True), ("hf_rwkv4_lm_a", True)]
CHECKPOINTS = {
    "based-360m": ("based.py:360m", {}),
    "based-1b-50b": ("based.py:1b_50b", {}),
    "based-1b": ("based.py:1b", {}),
    "attn-360m": ("attention.py:360m", {}),
    "attn-1b(multiple_of=256)": ("attention.py:1b", {}),
    "attn-1b(multiple_of=128)": ("attention.py:1b", {"mlp_dim": 4480}),
    "mamba-360m": ("mamba.py:360m", {}),
    "mamba-1b": ("mamba.py:1b", {}),
}


def assert_gradients(ours, reference):
    """Compare parameters' gradients with the reference's, which a module holds as if they were its weights."""
    wanted = dict(nnx.to_flat_state(nnx.state(reference, nnx.Param)))
    ours = dict(nnx.to_flat_state(ours))
    assert ours.keys() == wanted.keys()
    for path, leaf in ours.items():
        assert_close(leaf[...], np.asarray(wanted[path][...]), GRADIENT, f"gradient of {path}")


@pytest.mark.parametrize("name", ["taylor_exp_d8", "taylor_exp_d16"])
def test_feature_map(name):
    case = load(name)
    assert_close(taylor.full_taylor_features(jnp.asarray(case.inputs["x"])), case.outputs["phi"], POINTWISE)


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(name, out_and_grads):
    """Its XLA form with all gradients, and the outputs of the others, whose gradients the operations' tests compare."""
    kind, options = MIXERS[name]
    case = load(name)
    graphdefs = {}
    for impl in IMPLS:
        if named(KINDS[kind].IMPLEMENTATIONS, impl):
            graphdefs[impl], params = nnx.split(convert.mixer_from_reference(kind, case.weights, impl=impl, **options))

    def call(params, x, impl="xla"):
        return nnx.merge(graphdefs[impl], params)(x)

    y, (grads, grad_x) = out_and_grads(call, (params, case.inputs["x"]), case.inputs["r"])
    assert_close(y, case.outputs["y"], FORWARD, "y")
    assert_close(grad_x, case.gradients.pop("x"), GRADIENT, "gradient of x")
    assert_gradients(grads, convert.mixer_from_reference(kind, case.gradients, **options))
    others = jax.jit(lambda params, x: {impl: call(params, x, impl) for impl in graphdefs if impl != "xla"})
    for impl, y in others(params, case.inputs["x"]).items():
        assert_close(y, case.outputs["y"], FORWARD, impl)


@pytest.mark.parametrize("name", [name for name in MIXERS if not name.startswith(("zoology", "hf"))])
def test_prefill_then_decode(name):
    kind, options = MIXERS[name]
    case = load(name)
    mixer = convert.mixer_from_reference(kind, case.weights, **options)
    prefilled = case.meta.get("n_prefill", options.get("enc_length"))
    y, after_prefill, end = prefill_then_step(mixer, case.inputs["x"], prefilled)
    assert_close(y, case.outputs["y_prefill_then_decode"], FORWARD, "y")
    if kind == "taylor":
        assert_state(after_prefill, case.outputs["kv_state_after_prefill"], case.outputs["k_state_after_prefill"])
        assert_state(end, case.outputs["kv_state_end"], case.outputs["k_state_end"])
    if "final_state" in case.outputs:
        assert_close(end.state, case.outputs["final_state"], FORWARD, "state")
    if kind == "conv":
        assert_close(jnp.moveaxis(end, 1, 2), case.outputs["conv_state_end"], FORWARD, "state")


def test_mamba_and_its_states():
    """This file has no gradients; its convolution keeps the inputs channel first."""
    case = load("mamba_mixer")
    mixer = convert.mixer_from_reference("mamba", case.weights)
    y, _, end = prefill_then_step(mixer, case.inputs["x"], 1)
    assert_close(y, case.outputs["y"], FORWARD, "y")
    assert_close(in_one_pass(mixer, case.inputs["x"]), case.outputs["y"], FORWARD, "y")
    assert_close(jnp.moveaxis(end.conv, 1, 2), case.outputs["conv_state_end"], FORWARD, "conv")
    assert_close(end.state, case.outputs["ssm_state_end"], FORWARD, "state")


def test_rwkv7_leans_on_the_first_layer_s_values(out_and_grads):
    case, options = load("fla_rwkv7_layer_l1_a"), {"head_dim": 8, "value_residual": True, **RWKV7}
    graphdef, params = nnx.split(convert.mixer_from_reference("rwkv7", case.weights, **options))
    args = params, jnp.asarray(case.inputs["x"]), jnp.asarray(case.inputs["v_first"])
    y, (grads, grad_x, grad_v) = out_and_grads(
        lambda params, x, v: nnx.merge(graphdef, params)(x, v_first=v), args, jnp.asarray(case.inputs["r"])
    )
    assert_close(y, case.outputs["y"], FORWARD, "y")
    assert_close(grad_x, case.gradients.pop("x"), GRADIENT, "gradient of x")
    assert_close(grad_v, case.gradients.pop("v_first"), GRADIENT, "gradient of v_first")
    assert_gradients(grads, convert.mixer_from_reference("rwkv7", case.gradients, **options))


def test_rwkv7_channel_mix():
    """The file is of an operation: its matrices multiply from the right, and it starts from a token before."""
    case = load("fla_rwkv7_channel_mix_a")
    mixer = KINDS["rwkv7_channel_mix"](
        32, KINDS["rwkv7_channel_mix"].Config(expand=2.0), std=1.0, out_std=1.0, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    mixer.key.kernel[...], mixer.value.kernel[...] = (jnp.asarray(case.inputs[f"{n}_weight"]) for n in ("key", "value"))
    mixer.mix[...] = jnp.asarray(case.inputs["x_k"])[None]
    y, last = jax.jit(lambda mixer, *xs: mixer.prefill(*xs))(mixer, case.inputs["x"], case.inputs["x_prev"])
    assert_close(y, case.outputs["o"], FORWARD)
    assert_close(last, case.inputs["x"][:, -1], 0.0)


def test_wkv4_and_its_state():
    case = load("hf_rwkv4_time_mix_a")
    key, value = (jnp.asarray(case.outputs[name]) for name in ("key", "value"))
    decay, bonus = -np.exp(case.weights["time_decay"]), case.weights["time_first"]
    wkv, state = jax.jit(functools.partial(wkv4, return_state=True))(key, value, decay, bonus)
    assert_close(wkv, case.outputs["wkv"], FORWARD)
    for name in ("num", "den", "max"):
        assert_close(getattr(state, name), case.outputs[f"state_{name}"], FORWARD, name)


def test_prefix_with_a_mask():
    case = load("prefix_linear_attention_a")
    kind, options = MIXERS["prefix_linear_attention_a"]
    mixer = convert.mixer_from_reference(kind, case.weights, **options)
    call = jax.jit(lambda mixer, x, mask: mixer(x, encoder_mask=mask))
    y = call(mixer, case.inputs["x"][:, :16], case.inputs["mask"])
    assert_close(y, case.outputs["y_encoder_masked"], FORWARD)


def test_decode_after_a_prefill_of_one_token():
    kind, options = MIXERS["base_conv_a"]
    case = load("base_conv_a")
    mixer = convert.mixer_from_reference(kind, case.weights, **options)
    y, _, _ = prefill_then_step(mixer, case.inputs["x"], 1)
    assert_close(y, case.outputs["y_prefill1_then_decode"], FORWARD)


def assert_state(state, kv, k):
    """Compare our state (B, H, E, V+1) with kv (B, H, 1, V, E') and k (B, H, 1, 1, E') over all 1 + K + K^2 features.

    The reference's x_m x_n and x_n x_m carry 1/sqrt(2) each, our one product of two components the whole.
    """
    feature_dim = int(np.sqrt(k.shape[-1] - 1))
    m, n = np.tril_indices(feature_dim)
    shares = np.where(m == n, 1.0, np.sqrt(0.5))
    linear, quadratic = np.split(np.moveaxis(np.asarray(state), 2, 3), [1 + feature_dim], axis=-1)
    products = np.zeros((*linear.shape[:-1], feature_dim, feature_dim))
    products[..., m, n] = products[..., n, m] = quadratic * shares
    full = np.concatenate([linear, products.reshape(*linear.shape[:-1], -1)], axis=-1)[:, :, None]
    assert_close(full[..., :-1, :], kv, FORWARD, "kv_state")
    assert_close(full[..., -1:, :], k, FORWARD, "k_state")


def sums_and_normaliser(q, k, v, impl):
    """Return sum_j p_ij v_j and z_i = sum_j p_ij, which the operation divides by.

    A further value channel, zero in v and 1 under the constant feature in the state before, comes out as 1 / z.
    """
    B, _, H, V = v.shape
    state = taylor.initial_state(B, H, q.shape[-1], V + 1).at[:, :, 0, V].set(1)
    o = taylor.taylor_attention(q, k, jnp.pad(v, [(0, 0)] * 3 + [(0, 1)]), state=state, impl=impl)
    z = 1 / o[..., -1]
    return o[..., :-1] * z[..., None], z


def time_first(x):
    """Return (B, H, T, ...) as (B, T, H, ...), and the other way round."""
    return jnp.asarray(x, jnp.float32).swapaxes(1, 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_core(impl):
    """The operation in fp32 against arrays in fp64; FLA's eps of 1e-6 shows nowhere."""
    case = load("based_core_fp64")
    q, k, v = (time_first(case.inputs[name]) for name in "qkv")
    o, state = jax.jit(lambda q, k, v: taylor.taylor_attention(q, k, v, return_state=True, impl=impl))(q, k, v)
    for name in ("y", "y_fla_naive", "y_fla_chunk"):
        assert_close(time_first(o), case.outputs[name], FORWARD, name)
    assert_state(state, case.outputs["kv_state"][:, :, None], case.outputs["k_state"][:, :, None, None])
    sums = jax.jit(functools.partial(sums_and_normaliser, impl=impl))
    num, z = sums(q, k, v)
    for name in ("num", "y_fla_nonorm"):
        assert_close(time_first(num), case.outputs[name], FORWARD, name)
    assert_close(time_first(z), case.outputs["z"], FORWARD, "z")
    unscaled, _ = sums(q * np.sqrt(q.shape[-1]), k, v)
    assert_close(time_first(unscaled), case.outputs["y_fla_noscale_nonorm"], FORWARD, "without 1 / sqrt(K)")


@pytest.mark.parametrize("impl", ["oracle", "xla"])
@pytest.mark.parametrize("size", ["d8", "d16"])
@pytest.mark.parametrize("norm", ["norm", "nonorm"])
def test_fla(size, norm, impl, out_and_grads):
    parts = ("_",) if size == "d8" else ("_fwd_", "_bwd_")
    case = load(*(f"fla_based_{size}_{norm}{part}a" for part in parts))
    call = {
        "norm": functools.partial(taylor.taylor_attention, impl=impl),
        "nonorm": lambda q, k, v: sums_and_normaliser(q, k, v, impl)[0],
    }[norm]
    q, k, v, r = (time_first(case.inputs[name]) for name in "qkvr")
    y, grads = out_and_grads(call, (q, k, v), r)
    assert_close(time_first(y), case.outputs["y"], FORWARD, "y")
    for name, grad in zip("qkv", grads, strict=True):
        assert_close(time_first(grad), case.gradients[name], GRADIENT, f"gradient of {name}")


def test_mlp(out_and_grads):
    case = load("gated_mlp_base_default")
    width, hidden = case.weights["fc2.weight"].shape
    mlp = layers.SwiGLU(width, hidden, std=0.02, out_std=0.02, dtype=jnp.float32, rngs=nnx.Rngs(0))
    mlp.fc1.kernel[...], mlp.fc2.kernel[...] = (jnp.asarray(case.weights[f"{name}.weight"].T) for name in FC)
    y, (grads, grad_x) = out_and_grads(lambda mlp, x: mlp(x), (mlp, case.inputs["x"]), case.inputs["r"])
    assert_close(y, case.outputs["y"], FORWARD, "y")
    assert_close(grad_x, case.gradients["x"], GRADIENT, "gradient of x")
    for name in FC:
        assert_close(getattr(grads, name).kernel[...].T, case.gradients[f"{name}.weight"], GRADIENT, name)


def test_rms_norm(out_and_grads):
    case = load("rms_norm")
    norm = layers.rms_norm(case.weights["weight"].size, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(case.weights["weight"])
    y, (grads, grad_x) = out_and_grads(lambda norm, x: norm(x), (norm, case.inputs["x"]), case.inputs["r"])
    assert_close(y, case.outputs["y"], POINTWISE, "y")
    assert_close(grad_x, case.gradients["x"], FORWARD, "gradient of x")
    assert_close(grads.scale[...], case.gradients["weight"], FORWARD, "gradient of the weight")


def language_model(name, weights, scan_layers):
    fields = vars(LMS[name]) | {"scan_layers": scan_layers}
    return convert.lm_from_reference(weights, LMConfig(**fields))


def batch_of(case):
    """Return a batch with the file's labels, or with each token's successor as its label."""
    ids = case.inputs["ids"]
    after = np.pad(ids[:, 1:], [(0, 0), (0, 1)], constant_values=NO_LABEL)
    return {"inputs": jnp.asarray(ids), "labels": jnp.asarray(case.inputs.get("labels", after))}


@pytest.mark.parametrize(("name", "scan_layers"), STACKED)
def test_language_model(name, scan_layers):
    case = load(name)
    model, batch = language_model(name, case.weights, scan_layers), batch_of(case)
    graphdef, params = nnx.split(model)

    def loss(params):
        model = nnx.merge(graphdef, params)
        hidden, sums = model.hidden(batch["inputs"]), loss_sums(model, batch)
        return sums["loss"] / sums["count"], (hidden, model.logits(hidden))

    (value, (hidden, logits)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(value, case.outputs["loss"], FORWARD, "loss")
    assert_close(logits, case.outputs["logits"], LOGITS, "logits")
    assert_close(hidden, case.outputs.get("hidden", hidden), FORWARD, "hidden")
    assert_gradients(grads, language_model(name, case.gradients, scan_layers))


@pytest.mark.parametrize(
    ("name", "scan_layers", "greedy"),
    [
        ("tiny_based_lm", False, 8),
        ("tiny_based_lm", True, 8),
        ("hf_llama_a", True, 6),
        ("hf_mamba_a", False, 0),
        ("hf_rwkv4_lm_a", False, 0),
    ],
)
def test_language_model_decodes(name, scan_layers, greedy):
    case = load(name)
    model = language_model(name, case.weights, scan_layers)
    hidden, _, _ = prefill_then_step(model, case.inputs["ids"], case.meta.get("n_prefill", 24))
    logits = jax.jit(lambda model, hidden: model.logits(hidden))(model, hidden)
    assert_close(logits, case.outputs["logits_prefill_then_decode"], LOGITS)
    if greedy:
        prompt, expected = np.split(case.outputs[f"greedy{greedy}"], [-greedy], axis=1)
        np.testing.assert_array_equal(generate(model, list(prompt), greedy), expected)


def test_states_of_whole_models():
    """Each layer's cache after the last token, the convolution's inputs channel first."""
    case = load("hf_mamba_a")
    model = language_model("hf_mamba_a", case.weights, False)
    _, _, end = prefill_then_step(model, case.inputs["ids"], case.meta["n_prefill"])
    for i, (cache,) in enumerate(end):
        assert_close(jnp.moveaxis(cache.conv, 1, 2), case.outputs["conv_state"][i], FORWARD, f"conv {i}")
        assert_close(cache.state, case.outputs["ssm_state"][i], FORWARD, f"state {i}")

    case = load("hf_rwkv4_lm_a")
    model = language_model("hf_rwkv4_lm_a", case.weights, False)
    _, _, end = prefill_then_step(model, case.inputs["ids"], case.meta["n_prefill"])
    for i, ((time,), (channel,)) in enumerate(zip(end[::2], end[1::2], strict=True)):
        ours = {"ffn_x": channel, "att_x": time.shift, **time.state._asdict()}
        for name, value in ours.items():
            assert_close(value, case.outputs[f"state_{name}"][..., i], FORWARD, f"{name} {i}")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_weight_decay_groups(scan_layers):
    model = language_model("tiny_based_lm", load("tiny_based_lm").weights, scan_layers)
    groups = json.loads((FOLDER / "tiny_based_lm_weight_decay_groups.json").read_text())
    keys = reference_keys(model)
    ours = decay_groups(nnx.state(model, nnx.Param), "reference")
    for paths, group in zip(ours, ("decay", "no_decay"), strict=True):
        assert sorted(key for path in paths for (key,) in keys[path]) == sorted(groups[group])


def test_initial_deviations():
    """Three sigma of both samples; zoology's out-projection is named proj_o and so escapes its own rescaling."""
    model = LM(LMS["zoology_lm_based"], rngs=nnx.Rngs(0))
    ours = nnx.to_flat_state(nnx.state(model, nnx.Param))
    wanted = load("zoology_lm_based").meta["init_std"]
    keys = reference_keys(model, "zoology")
    for parts, leaf in ours:
        ((key,),) = keys["/".join(map(str, parts))]
        if not key.endswith("proj_o.weight"):
            assert abs(float(jnp.std(leaf[...])) - wanted[key]) <= 6 * wanted[key] / np.sqrt(2 * leaf.size), key


def test_state_sizes():
    """Elements per sequence; of its block_size + 1 keys zoology does not count the query's own."""
    for name in (
        "zoology_based_taylor_exp",
        "zoology_based_ReLU",
        "zoology_based_pos_elu",
        "zoology_base_conv_short",
        "zoology_mha",
        "zoology_sliding",
    ):
        kind, options = MIXERS[name]
        case = load(name)
        _, T, D = case.inputs["x"].shape
        own = 2 * D if kind == "window" else 0
        size = convert.mixer_from_reference(kind, case.weights, **options).state_size(T)
        assert size == case.meta["state_size_elements"] + own, name
    model = nnx.eval_shape(lambda: LM(LMS["zoology_lm_based"], rngs=nnx.Rngs(0)))
    assert 4 * model.state_size(1024) == load("zoology_lm_based").meta["state_size_bytes_seq1024"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_released_shapes(name):
    """The reference configs under the released keys, as `save_hf` writes and `load_hf` expects them."""
    spec, changes = CHECKPOINTS[name]
    fields = configs.load(str(CONFIGS / spec)).model.to_dict()
    model = nnx.eval_shape(lambda: LM(configs.build(LMConfig, fields | changes), rngs=nnx.Rngs(0)))
    released = json.loads((FOLDER / "checkpoint_shapes.json").read_text())[name]
    skeleton = "mamba" if name.startswith("mamba") else "based"
    shapes = {key: shape for (key,), shape in reference_shapes(model, reference_keys(model, skeleton)).items()}
    shapes[SKELETONS[skeleton].head] = shapes[SKELETONS[skeleton].embedding]
    assert shapes == {key: tuple(shape) for key, shape in convert.reference.unwrapped(released["state_dict"]).items()}
    assert model.num_params() == released["params_tied"]
