"""Every mixer equals its published definition, by arrays that the public PyTorch code computed.

The files stand in tests/parity; a file's `meta` names its source. Errors are relative to max(1, max|reference|).
Models are in `test_parity_models.py`; operations, layers and data are compared by the tests of their own.
"""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers.cases import parametrize_some
from helpers.decoding import in_one_pass, prefill_then_step
from helpers.reference_cases import FOLDER, FORWARD, GRADIENT, assert_close, assert_gradients, assert_taylor_state, load

from based_jax import convert
from based_jax.nn.mixers import MIXERS, make_mixer
from based_jax.ops.taylor_decode import total

RWKV7 = {"decay_low_rank_dim": 6, "gate_low_rank_dim": 8, "a_low_rank_dim": 5, "v_low_rank_dim": 4}
BASED, ZOOLOGY = convert.window_from_based, convert.window_from_zoology
GSA_B, KDA_B = {"feature_map": "relu", "gate_logit_normalizer": 4.0}, {"allow_neg_eigval": True}
NO_ROTARY = {"rotary_fraction": 0.0, "bias": True}
CASES = {
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
    "zoology_gated_delta_net": ("gated_deltanet", {"num_heads": 2, "use_gate": False}),
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
    "zoology_based_performer": ("linear", {"num_heads": 2, "feature_map": "performer"}),
    "fla_gsa_layer_b": ("gsa", {"num_heads": 4, "num_kv_heads": 2, "num_slots": 6, "conv_size": 4, **GSA_B}),
    "fla_retention_layer_b": ("retnet", {"num_heads": 4, "num_kv_heads": 2, "expand_v": 1.0, "conv_size": 4}),
    "fla_kda_layer_b": ("kda", {"num_heads": 2, "head_dim": 8, "num_v_heads": 4, "conv_size": 0, **KDA_B}),
}
LONG = ("fla_retention_layer_b", "fla_gsa_layer_b", "fla_kda_layer_b")
DECODED = [name for name in CASES if not name.startswith(("zoology", "hf"))]
LONG_DECODED = ("fla_retention_layer_b", "fla_gsa_layer_b")


def test_every_file_is_compared():
    """Its name stands as a string in some test."""
    tests = [ast.parse(path.read_text()) for path in Path(__file__).parent.rglob("*.py")]
    nodes = (node for test in tests for node in ast.walk(test) if isinstance(node, ast.Constant))
    named = {node.value.split(".")[0] for node in nodes if isinstance(node.value, str)}
    assert {path.stem for path in FOLDER.iterdir()} <= named


@parametrize_some("name", CASES, [name for name in CASES if name not in LONG])
def test_mixer(name, out_and_grads):
    """Its first XLA form with all gradients, and the outputs of the others, whose gradients the operations compare."""
    kind, options = CASES[name]
    case = load(name)
    first, *others = (impl for impl, way in MIXERS[kind].IMPLEMENTATIONS.items() if way.platform is None)
    graphdefs = {}
    for impl in (first, *others):
        graphdefs[impl], params = nnx.split(convert.mixer_from_reference(kind, case.weights, impl=impl, **options))

    def call(params, x, impl=first):
        return nnx.merge(graphdefs[impl], params)(x)

    y, (grads, grad_x) = out_and_grads(call, (params, case.inputs["x"]), case.inputs["r"])
    assert_close(y, case.outputs["y"], FORWARD, "y")
    assert_close(grad_x, case.gradients.pop("x"), GRADIENT, "gradient of x")
    constants = {key: np.zeros_like(w) for key, w in case.weights.items() if key.endswith("random_feats")}
    assert_gradients(grads, convert.mixer_from_reference(kind, constants | case.gradients, **options))
    outputs = jax.jit(lambda params, x: {impl: call(params, x, impl) for impl in others})(params, case.inputs["x"])
    for impl, y in outputs.items():
        assert_close(y, case.outputs["y"], FORWARD, impl)


@parametrize_some("name", DECODED, [name for name in DECODED if name not in LONG_DECODED])
def test_prefill_then_decode(name):
    kind, options = CASES[name]
    case = load(name)
    mixer = convert.mixer_from_reference(kind, case.weights, **options)
    prefilled = case.meta.get("n_prefill", options.get("enc_length"))
    y, after_prefill, end = prefill_then_step(mixer, case.inputs["x"], prefilled)
    assert_close(y, case.outputs["y_prefill_then_decode"], FORWARD, "y")
    if kind == "taylor":
        for cache, when in ((after_prefill, "after_prefill"), (end, "end")):
            assert_taylor_state(total(cache.state), case.outputs[f"kv_state_{when}"], case.outputs[f"k_state_{when}"])
    if "final_state" in case.outputs:
        assert_close(end.state.memory, case.outputs["final_state"], FORWARD, "state")
    if kind == "conv":
        assert_close(jnp.moveaxis(end.state, 1, 2), case.outputs["conv_state_end"], FORWARD, "state")


def test_mamba_and_its_states():
    """This file has no gradients; its convolution keeps the inputs channel first."""
    case = load("mamba_mixer")
    mixer = convert.mixer_from_reference("mamba", case.weights)
    y, _, end = prefill_then_step(mixer, case.inputs["x"], 1)
    assert_close(y, case.outputs["y"], FORWARD, "y")
    assert_close(in_one_pass(mixer, case.inputs["x"]), case.outputs["y"], FORWARD, "y")
    assert_close(jnp.moveaxis(end.state.conv, 1, 2), case.outputs["conv_state_end"], FORWARD, "conv")
    assert_close(end.state.memory, case.outputs["ssm_state_end"], FORWARD, "state")


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
    mixer = make_mixer("rwkv7_channel_mix", 32, expand=2.0, rngs=nnx.Rngs(0))
    mixer.key.kernel[...], mixer.value.kernel[...] = (jnp.asarray(case.inputs[f"{n}_weight"]) for n in ("key", "value"))
    mixer.mix[...] = jnp.asarray(case.inputs["x_k"])[None]
    cache = mixer.init_cache(*case.inputs["x"].shape[:2])._replace(state=case.inputs["x_prev"])
    y, cache = jax.jit(lambda mixer, *xs: mixer.prefill(*xs))(mixer, case.inputs["x"], cache)
    assert_close(y, case.outputs["o"], FORWARD)
    assert_close(cache.state, case.inputs["x"][:, -1], 0.0)


def test_prefix_with_a_mask():
    case = load("prefix_linear_attention_a")
    kind, options = CASES["prefix_linear_attention_a"]
    mixer = convert.mixer_from_reference(kind, case.weights, **options)
    call = jax.jit(lambda mixer, x, mask: mixer(x, encoder_mask=mask))
    y = call(mixer, case.inputs["x"][:, :16], case.inputs["mask"])
    assert_close(y, case.outputs["y_encoder_masked"], FORWARD)


def test_decode_after_a_prefill_of_one_token():
    kind, options = CASES["base_conv_a"]
    case = load("base_conv_a")
    mixer = convert.mixer_from_reference(kind, case.weights, **options)
    y, _, _ = prefill_then_step(mixer, case.inputs["x"], 1)
    assert_close(y, case.outputs["y_prefill1_then_decode"], FORWARD)


def test_state_sizes():
    """Elements per sequence, as zoology counts them."""
    for name in (
        "zoology_based_taylor_exp",
        "zoology_based_ReLU",
        "zoology_based_pos_elu",
        "zoology_base_conv_short",
        "zoology_mha",
        "zoology_sliding",
    ):
        kind, options = CASES[name]
        case = load(name)
        size = convert.mixer_from_reference(kind, case.weights, **options).published_state_size(
            case.inputs["x"].shape[1]
        )
        assert size == case.meta["state_size_elements"], name
