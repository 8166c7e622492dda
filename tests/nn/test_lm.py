import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.nn.block import Block
from based_jax.nn.lm import LM, LMConfig

D, T, VOCAB = 16, 10, 50
SMALL = {
    "attention": {"num_heads": 2, "bias": True},
    "taylor": {"num_heads": 2, "feature_dim": 4},
    "window": {"num_heads": 2, "window": 4},
}
PUBLISHED = ("attention", "base_conv", "conv", "taylor", "window")  # those whose initial values the reference fixes
PATTERN = tuple((kind, SMALL.get(kind, {})) for kind in ("conv", "taylor", "window"))


def small(layers=PATTERN, **options):
    return LMConfig(**{"layers": layers, "d_model": D, "vocab_size": VOCAB, "dtype": "float32", **options})


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, VOCAB, (2, T)), jnp.int32)


def unstack(scanned, flat):
    """Give the parameters of a scanned model to one that is not."""
    blocks = [(stack, i, block) for stack in scanned.stacks for i in range(stack.repeats) for block in stack.blocks]
    for (stack, i, block), target in zip(blocks, flat.stacks, strict=True):
        params = nnx.state(block)
        nnx.update(target.blocks[0], params if stack.repeats == 1 else jax.tree.map(lambda p, i=i: p[i], params))
    nnx.update(flat.embed, nnx.state(scanned.embed))
    nnx.update(flat.norm, nnx.state(scanned.norm))


def test_scanned_layers_equal_unscanned_ones(tokens, close):
    layers = PATTERN[1:] * 2 + PATTERN[1:2]
    scanned, flat = (LM(small(layers, scan_layers=scan), rngs=nnx.Rngs(0)) for scan in (True, False))
    assert [stack.repeats for stack in scanned.stacks] == [2, 1]
    assert (len(flat.stacks), len(flat.mixers()), len(scanned.mixers())) == (5, 5, 5)
    unstack(scanned, flat)

    @jax.jit
    def logits_and_decode(model, tokens):
        hidden, cache = model.prefill(tokens[:, :-1], model.init_cache(2, T))
        last, _ = model.step(tokens[:, -1], cache)
        return model(tokens), hidden, last

    close(logits_and_decode(scanned, tokens), logits_and_decode(flat, tokens))
    for count in (LM.num_params, lambda m: m.state_size(100), lambda m: m.flops_per_token(100)):
        assert count(scanned) == count(flat)


@pytest.mark.parametrize(
    "kinds",
    [
        ("attention", "conv", "taylor", "gated_deltanet", "rwkv4_channel_mix"),
        pytest.param((*PUBLISHED, "mamba", "gated_deltanet", "rwkv4", "rwkv4_channel_mix"), marks=pytest.mark.long),
    ],
    ids=len,
)
def test_a_hybrid_of_many_mixers_decodes_what_it_computes_in_parallel(kinds, tokens, close):
    model = LM(small(tuple((kind, SMALL.get(kind, {})) for kind in kinds)), rngs=nnx.Rngs(0))
    ids = jnp.asarray([[1] * T, [0] * 3 + [1] * (T - 3)], jnp.int32)
    hidden = jax.jit(lambda m, x: m.hidden(x, ids))(model, tokens)
    first, cache = jax.jit(lambda m, x: m.prefill(x, m.init_cache(2, T), ids[:, :6]))(model, tokens[:, :6])
    outputs, step = [first], jax.jit(lambda m, x, cache: m.step(x, cache))
    for t in range(6, T):
        y, cache = step(model, tokens[:, t], cache)
        outputs.append(y[:, None])
    decoded = np.concatenate(outputs, axis=1)
    close(decoded[0], hidden[0])
    close(decoded[1, 3:], hidden[1, 3:])


BROKEN_IDS = np.asarray([[0, 1, 0, 1, 2, 0, 0, 2, 2, 0], [3, 3, 0, 3, 3, 0, 1, 1, 0, 1]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_within_documents_changes_nothing(dtype, tokens, close):
    kinds = "conv", "window", "rwkv4_channel_mix"
    model = LM(small(tuple((kind, SMALL.get(kind, {})) for kind in kinds), dtype=dtype), rngs=nnx.Rngs(0))

    def squares(model, tokens, segment_ids):
        hidden = model.hidden(tokens, segment_ids).astype(jnp.float32)
        return jnp.sum(jnp.where(segment_ids[..., None] != 0, hidden, 0) ** 2), hidden

    run = jax.jit(nnx.value_and_grad(squares, has_aux=True))
    (_, hidden), gradients = run(model, tokens, jnp.asarray(BROKEN_IDS))
    behind = [np.argsort(row == 0, kind="stable") for row in BROKEN_IDS]
    moved, ids = (jnp.take_along_axis(jnp.asarray(x), jnp.asarray(behind), axis=1) for x in (tokens, BROKEN_IDS))
    (_, expected), of_moved = run(model, moved, ids)
    for row, order in enumerate(behind):
        real = np.count_nonzero(BROKEN_IDS[row])
        close(hidden[row][order[:real]], expected[row, :real], dtype)
    close(gradients, of_moved, dtype)


def test_layers_move_no_tokens_of_packed_documents(tokens):
    """The model's own door does: ids before the first layer, and hidden states behind the last."""
    model = LM(small((("conv", {}), ("window", SMALL["window"]))), rngs=nnx.Rngs(0))

    def loss(model, tokens, segment_ids):
        return jnp.sum(jnp.cos(model.hidden(tokens, segment_ids)))

    text = jax.jit(nnx.grad(loss)).lower(model, tokens, jnp.asarray(BROKEN_IDS)).as_text()
    moved = re.findall(r"stablehlo\.(?:dynamic_)?(?:gather|scatter).*?-> tensor<([\dx]*)x\w+>", text, re.DOTALL)
    assert {shape for shape in moved if shape.startswith(f"2x{T}")} == {f"2x{T}", f"2x{T}x{D}"}


@pytest.mark.parametrize(
    "scan, mlp",
    [(False, "none"), *(pytest.param(*x, marks=pytest.mark.long) for x in ((False, "swiglu"), (True, "identity")))],
)
def test_hidden_states_of_some_positions_are_those_of_all(scan, mlp, tokens, close, rng):
    model = LM(small(PATTERN * 2, scan_layers=scan, mlp=mlp, norm="layer"), rngs=nnx.Rngs(0))
    places = jnp.asarray([rng.permutation(T)[:5] for _ in range(2)])

    def at_places(model, tokens):
        return model.hidden(tokens, positions=places)

    def of_all(model, tokens):
        return jnp.take_along_axis(model.hidden(tokens), places[..., None], axis=1)

    def with_gradients(call):
        def cubes(*arguments):
            hidden = call(*arguments)
            return (hidden.astype(jnp.float32) ** 3).sum(), hidden

        return nnx.jit(nnx.value_and_grad(cubes, has_aux=True))(model, tokens)

    (ours, gradients), (right, wanted) = map(with_gradients, (at_places, of_all))
    close(ours, right)
    jax.tree.map(close, jax.tree.leaves(gradients), jax.tree.leaves(wanted))


def test_dropout_is_of_passes_that_have_a_key(tokens):
    model = LM(small(embed_dropout=0.5), rngs=nnx.Rngs(0))
    hidden = jax.jit(lambda model, key: model.hidden(tokens, dropout_key=key))
    whole, first, again, other = (np.asarray(hidden(model, key)) for key in (None, *map(jax.random.key, (1, 1, 2))))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, whole)
    np.testing.assert_array_equal(whole, nnx.jit(lambda model: model.hidden(tokens))(model))


def test_dropout_keeps_the_mean_and_drops_its_share():
    y = np.asarray(layers.dropout(jnp.full((200, 500), 2.0), 0.1, jax.random.key(0)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(2 / 0.9)}
    assert abs((y == 0).mean() - 0.1) <= 3 * math.sqrt(0.1 * 0.9 / y.size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_are_fp32_over_the_padded_vocabulary(dtype, tokens, close):
    model = LM(small(dtype=dtype, pad_vocab_multiple=16), rngs=nnx.Rngs(0))
    hidden, logits = jax.jit(lambda m, x: (m.hidden(x), m(x)))(model, tokens)
    assert (hidden.dtype, logits.dtype, logits.shape) == (dtype, jnp.float32, (2, T, 64))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert np.isfinite(logits).all()
    table = np.asarray(model.embed.embedding[...].astype(dtype), np.float64)
    close(logits, np.asarray(hidden, np.float64) @ table.T)


@pytest.mark.parametrize(
    "ids", [np.int8([[1, 127, -1]]), np.uint8([[1, 255, 255]]), np.uint16([[1, 299, 300]])], ids=str
)
def test_a_compiled_model_knows_its_own_ids_alone_of_whatever_dtype(ids):
    config = LMConfig(layers=(("conv", {}),), d_model=4, vocab_size=300, mlp="none", dtype="float32")
    hidden = jax.jit(lambda ids: LM(config, rngs=nnx.Rngs(0)).hidden(ids))(ids)
    known = (ids >= 0) & (ids.astype(int) < 300)
    np.testing.assert_array_equal(np.isnan(hidden).any(axis=-1), ~known)


def test_num_params_counts_the_tied_head_once():
    model = LM(small(), rngs=nnx.Rngs(0))
    conv = D * 4 * D + 4 * D + 3 * 2 * D + 2 * D * D + D
    taylor = 2 * D * 2 * 4 + 2 * D * D
    attention = 4 * D * D
    mlp_and_norms = 3 * D * 2 * D + 2 * D
    assert model.num_params() == 56 * D + D + conv + taylor + attention + 3 * mlp_and_norms


@pytest.mark.parametrize(
    ("d_model", "num_layers", "taylor", "elements"),
    [
        (1024, 27, (1, 6, 11, 16, 21), 795_600 + 1_320_960 + 104_448),
        (1792, 36, (1, 6, 11, 16, 21, 27, 33), 1_936_368 + 3_236_352 + 236_544),
    ],
)
def test_state_size_of_the_released_models(d_model, num_layers, taylor, elements):
    def layer(i):
        return ("taylor", {}) if i in taylor else ("window", {"window": 129}) if i - 1 in taylor else ("conv", {})

    config = LMConfig(layers=tuple(map(layer, range(num_layers))), d_model=d_model, scan_layers=True)
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    assert model.state_size(2048) == model.state_size(64) == elements


def test_flops_of_a_token():
    model = LM(small(), rngs=nnx.Rngs(0))
    mixers = sum(mixer.flops_per_token(100) for mixer in model.mixers())
    assert model.flops_per_token(100) == mixers + 3 * 2 * 3 * D * 2 * D + 2 * D * 56


def initial(path):
    """Return the mean and the deviation that a parameter starts with in a model of all mixers, twice."""
    std, taps = 0.02, 3
    if re.search("norm.*scale", path):
        return 1.0, 0.0
    if path.endswith("bias") and "conv_bias" not in path:
        return 0.0, 0.0
    if re.search("conv_(kernel|bias)", path):
        return 0.0, 1 / math.sqrt(3 * taps)
    if re.search("(out_proj|fc2)/kernel", path):
        return 0.0, std / math.sqrt(2 * 2 * len(PUBLISHED))
    return 0.0, std


@pytest.mark.parametrize("scan_layers", [False, True])
def test_initial_values_have_the_reference_statistics(scan_layers):
    layers = tuple((kind, SMALL.get(kind, {})) for kind in PUBLISHED) * 2
    config = small(layers, d_model=64, vocab_size=1000, scan_layers=scan_layers)
    model = LM(config, rngs=nnx.Rngs(0))
    for keys, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path, x = "/".join(map(str, keys)), np.asarray(value[...], np.float64).ravel()
        mean, std = initial(path)
        assert abs(x.mean() - mean) <= 3 * std / math.sqrt(x.size), path
        assert abs(x.std() - std) <= 3 * std / math.sqrt(2 * x.size), path
        if "conv_" in path:
            assert abs(x).max() <= 1 / math.sqrt(3), path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, "layers is empty"),
        ({"layers": (("tailor", {}),)}, "Unknown mixer 'tailor': did you mean 'taylor'? Allowed: attention, "),
        (
            {"layers": (("taylor", {"feature_dims": 8}),)},
            "option of mixer 'taylor' 'feature_dims': did you mean 'feature",
        ),
        ({"layers": (("taylor", {"num_heads": 3}),)}, "d_model 16 cannot be divided into 3 heads"),
        ({"d_model": 0}, "d_model is 0; it is at least 1"),
        ({"vocab_size": 0}, "vocab_size is 0; it is at least 1"),
        ({"pad_vocab_multiple": 0}, "pad_vocab_multiple is 0; it is at least 1"),
        ({"mlp_dim": -1}, "mlp_dim is -1; it is at least 0"),
        ({"embed_dropout": 1.0}, "embed_dropout is 1.0; it is at least 0 and below 1"),
        ({"init_std": -0.1}, "init_std is -0.1; it is above 0"),
        ({"norm": "rmss"}, "Unknown norm 'rmss': did you mean 'rms'?"),
        ({"final_norm": "rmss"}, "Unknown final_norm 'rmss': did you mean 'rms'?"),
        ({"mlp": "swigloo"}, "Unknown mlp 'swigloo': did you mean 'swiglu'?"),
        ({"dtype": "bf16"}, "Unknown dtype 'bf16'"),
        ({"remat": "all"}, "Unknown remat 'all'"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        nnx.eval_shape(lambda: LM(small(**options), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_trace_reads_like_the_model(tokens, scan_layers):
    """Each operation of a compiled program is named by where it stands: stack, block, and mixer or MLP."""
    model = LM(small(PATTERN * 2, scan_layers=scan_layers), rngs=nnx.Rngs(0))

    def passes(model, tokens):
        hidden, cache = model.prefill(tokens, model.init_cache(2, T))
        return model.cross_entropy(model.hidden(tokens), tokens), model.logits(hidden), model.step(tokens[:, 0], cache)

    names = set(re.findall(r'op_name="([^"]*)"', jax.jit(passes).lower(model, tokens).compile().as_text()))
    kinds = [kind for kind, _ in PATTERN]
    places = (
        [(0, i, kind) for i, kind in enumerate(kinds)] if scan_layers else [(i, 0, k) for i, k in enumerate(kinds * 2)]
    )
    for stack, block, kind in places:
        for layer in (kind, "mlp"):
            assert any(re.search(rf"/stack_{stack}/(.*/)?block_{block}/(.*/)?{layer}/", name) for name in names)
    assert all(any(f"/{scope}/" in name for name in names) for scope in ("embed", "norm", "head"))


def test_equal_layers_are_traced_once(tokens, monkeypatch):
    extended, kinds = Block.extend, []
    monkeypatch.setattr(Block, "extend", lambda block, *inputs: kinds.append(block.kind) or extended(block, *inputs))
    model = LM(small((*PATTERN, *PATTERN[::-1])), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    jax.make_jaxpr(lambda tokens: nnx.merge(graphdef, params).hidden(tokens))(tokens)
    assert kinds == ["conv", "taylor", "window", "conv"]  # the first layer has nothing to add
