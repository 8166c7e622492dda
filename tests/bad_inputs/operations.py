"""Calls of operations and models: what no annotation allows is refused before anything is compiled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from based_jax.nn.lm import LM, LMConfig
from based_jax.ops.conv import short_conv, short_conv_step
from based_jax.ops.cross_entropy import linear_cross_entropy
from based_jax.ops.delta_rule import delta_rule, dplr_step
from based_jax.ops.diagonal_ssm import diagonal_ssm
from based_jax.ops.gated_conv import gated_short_conv
from based_jax.ops.gated_linear_attention import gated_linear_attention
from based_jax.ops.gated_slot_attention import SlotState, gated_slot_attention
from based_jax.ops.linear_attention import linear_attention
from based_jax.ops.long_conv import long_conv
from based_jax.ops.norm import residual_layer_norm, residual_rms_norm
from based_jax.ops.selective_scan import selective_scan
from based_jax.ops.softmax import attention, window_attention
from based_jax.ops.softmax_step import attention_step
from based_jax.ops.ssd import ssd
from based_jax.ops.taylor import taylor_attention
from based_jax.ops.token_shift import token_shift
from based_jax.ops.wkv4 import wkv4
from tests.bad_inputs.cases import Call, Command

X, INTS = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2, 4), jnp.int32)
SHORT, NARROW, NONE = X[:, :2], X[..., :3], X[:, :0]
TOKENS, CHANNELS, IDS = X[..., 0], jnp.ones(2), jnp.ones((1, 3), jnp.int32)
LONG = np.full((1, 3), 2**32 + 1)
WIDE_STATE = jnp.zeros((1, 2, 4, 5))
EXPANDED = jnp.zeros((1, 2, 15, 5))


def case(name: str, operation, *arguments, sentence: str, **options) -> Call:
    """Return the case of a call of an operation."""
    return Call(name, lambda folder: operation(*arguments, **options), sentence)


def of_model(name: str, read, sentence: str) -> Call:
    """Return the case of what reads with a model of 5 ids."""

    def call(folder):
        config = LMConfig((("conv", {}),), 4, vocab_size=5, mlp="none", dtype="float32")
        return read(LM(config, rngs=nnx.Rngs(0)))

    return Call(name, call, sentence)


def model(name: str, ids, sentence: str, *, segment_ids=None) -> Call:
    """Return the case of a model of 5 ids that reads some."""
    return of_model(name, lambda model: model(ids, segment_ids), sentence)


def cached(name: str, change, sentence: str) -> Call:
    """Return the case of a step with the changed cache of a model of 5 ids."""
    return of_model(name, lambda model: model.step(IDS[:, 0], change(model.init_cache(1, 3))), sentence)


def config(name: str, value, sentence: str) -> Call:
    """Return the case of a model with a value of its config."""
    return Call(f"{name} {value}", lambda folder: LMConfig((("conv", {}),), 16, **{name: value}), sentence)


CASES: tuple[Command | Call, ...] = (
    # dtypes
    case("attention of ints", attention, INTS, INTS, INTS, sentence="attention: q is int32 (1, 3, 2, 4); it is"),
    case("values of ints", taylor_attention, X, X, INTS, sentence="v is int32 (1, 3, 2, 4); it is an array of floats"),
    case(
        "a list", linear_attention, [[1.0]], X, X, sentence="q is list [[1.0]]; it is an array of floats (B, T, H, K)"
    ),
    case("ids of floats", attention, X, X, X, segment_ids=1.0 * IDS, sentence="segment_ids is float32 (1, 3); it is"),
    case("a mask for ids", token_shift, TOKENS, segment_ids=IDS > 0, sentence="segment_ids is bool (1, 3); it is"),
    case("a real transition", diagonal_ssm, X, *(X[0, 0],) * 3, sentence="log_a is float32 (2, 4); it is a complex"),
    case("labels of floats", linear_cross_entropy, TOKENS, TOKENS[0], TOKENS[..., 0], sentence="labels is float32"),
    # shapes
    case("fewer keys", attention, X, SHORT, X, sentence="k is float32 (1, 2, 2, 4); it is an array of floats (B, T, H"),
    case("narrower keys", delta_rule, X, NARROW, X, X, TOKENS, sentence="with B = 1, T = 3, H = 2, K = 4"),
    case(
        "arrays without heads",
        gated_linear_attention,
        TOKENS,
        TOKENS,
        TOKENS,
        TOKENS,
        sentence="q is float32 (1, 3, 2)",
    ),
    case(
        "two decays of four", gated_linear_attention, X, X, X, X[..., :2], sentence="array of floats (B, T, H, K or 1)"
    ),
    case(
        "a wide state", gated_linear_attention, X, X, X, -X, state=WIDE_STATE, sentence="state is float32 (1, 2, 4, 5)"
    ),
    case("a state of Taylor", taylor_attention, X, X, X, state=X, sentence="state is float32 (1, 3, 2, 4)"),
    case(
        "half a state", wkv4, TOKENS, TOKENS, CHANNELS, CHANNELS, state=(X, X), sentence="a WkvState of num, den, max"
    ),
    case(
        "slots", gated_slot_attention, *(X,) * 5, state=SlotState(X, X), sentence="state.keys is float32 (1, 3, 2, 4)"
    ),
    case(
        "ids of another length",
        ssd,
        X,
        TOKENS,
        -CHANNELS,
        X,
        X,
        segment_ids=IDS[:, :2],
        sentence="segment_ids is int32",
    ),
    case("rates of other heads", ssd, X, TOKENS, -jnp.ones(3), X, X, sentence="A is float32 (3,); it is an array of"),
    case("states of A", selective_scan, TOKENS, TOKENS, X[0, 0], TOKENS, TOKENS, sentence="B is float32 (1, 3, 2)"),
    case("a kernel of other channels", short_conv, TOKENS, jnp.ones((3, 5)), sentence="kernel is float32 (3, 5)"),
    case("a short state", short_conv, TOKENS, TOKENS[0], state=TOKENS[:, :2], sentence="state has 2 inputs; of these"),
    case("a step's state", short_conv_step, TOKENS[:, 0], TOKENS[0], TOKENS, dilation=2, sentence="it has 5"),
    case("a gated state", gated_short_conv, X[..., 0, :], X[0, :, 0, :2], state=X[:, 0], sentence="state is float32"),
    case(
        "a short filter",
        long_conv,
        TOKENS,
        TOKENS[0, :2],
        sentence="kernel is float32 (2, 2); it is an array of floats",
    ),
    case("a step of a sequence", dplr_step, X, X, X, X, X, X, X, sentence="q is float32 (1, 3, 2, 4); it is"),
    case("more components than a query has", attention, X, X, X, head_dim=5, sentence="between 1 and the 4 components"),
    case("lengths of other rows", attention_step, X[:, 0], X, X, IDS[0, :2], sentence="length is int32 (2,)"),
    case("more heads of keys", attention_step, X[:, 0, :1], X, X, IDS[:, 0], sentence="2 heads; these divide the 1 of"),
    case("a scale of other channels", residual_rms_norm, X, None, CHANNELS, sentence="scale is float32 (2,)"),
    case("another y", residual_layer_norm, X, SHORT, X[0, 0, 0], X[0, 0, 0], sentence="y is float32 (1, 2, 2, 4)"),
    case(
        "no token",
        gated_linear_attention,
        NONE,
        NONE,
        NONE,
        NONE,
        sentence="none of its axes but the batch may be empty.",
    ),
    case("strings", token_shift, np.array([[["a"]]]), sentence="x is ndarray array([[['a']]]"),
    case("a masked array", token_shift, np.ma.masked_array(np.ones((1, 3, 2))), sentence="x is MaskedArray"),
    case(
        "floats of 8 bits",
        token_shift,
        TOKENS.astype(jnp.float8_e4m3fn),
        sentence="float8_e4m3fn, which JAX",
    ),
    case("no value", window_attention, X, X, X[..., :0], window=2, sentence="v is (1, 3, 2, 0); none of its axes"),
    case(
        "a state of other values",
        taylor_attention,
        X,
        X,
        X[..., :2],
        state=EXPANDED,
        sentence="V+1, are (15, 3).",
    ),
    case("a state of other features", taylor_attention, X, X, X, state=EXPANDED[:, :, :5], sentence="are (15, 5)."),
    case(
        "a linear state",
        linear_attention,
        X,
        X,
        X,
        state=EXPANDED,
        sentence="E and V+1, are (4, 5).",
    ),
    # static values
    case("a window of an array", window_attention, X, X, X, window=jnp.ones(()), sentence="window is ArrayImpl"),
    case("a window beyond all", window_attention, X, X, X, window=2**70, sentence="it is at most 2147483647."),
    case("half a key", window_attention, X, X, X, window=2.5, sentence="window is float 2.5; it is an int."),
    case("a true window", window_attention, X, X, X, window=True, sentence="window is bool True; it is an int."),
    case("no key", window_attention, X, X, X, window=0, sentence="window is 0"),
    case("no dilation", short_conv, TOKENS, TOKENS[0], dilation=0, sentence="dilation is 0; it is at least 1."),
    case("some SiLU", short_conv, TOKENS, TOKENS[0], silu=1, sentence="silu is int 1; it is True or False."),
    case(
        "no scale", gated_linear_attention, X, X, X, -X, scale=math.nan, sentence="scale is float nan; it is a finite"
    ),
    case("no form", attention, X, X, X, impl=None, sentence="impl is NoneType None; it is a string."),
    case("a scale beyond all", gated_linear_attention, X, X, X, -X, scale=10**400, sentence="it is a finite number."),
    case("a norm of ints", residual_rms_norm, X, None, X[0, 0, 0], dtype="int8", sentence="dtype is 'int8'; it is one"),
    case("a norm of no dtype", residual_rms_norm, X, None, X[0, 0, 0], dtype="bf", sentence="dtype is 'bf'; it is one"),
    case("an eps below 0", residual_rms_norm, X, None, X[0, 0, 0], eps=-1.0, sentence="eps is -1.0; it is at least 0."),
    case(
        "a large vocabulary",
        linear_cross_entropy,
        X,
        X[0, 0],
        INTS[..., 0],
        vocab_size=3,
        sentence="1 to the table's 2.",
    ),
    # models
    model("an id above the vocabulary", IDS + 4, "ids has 5; the model knows ids 0 to 4."),
    model("a negative id", -IDS, "ids has -1; the model knows ids 0 to 4."),
    model("ids that are floats", 1.0 * IDS, "LM.__call__: ids is float32 (1, 3); it is an array of ints (B, T)."),
    model("an id of 33 bits", LONG, "LM.__call__: ids has 4294967297; it is from -2147483648 to 2147483647."),
    model("documents of 33 bits", IDS, "segment_ids has 4294967297; it is from -2147", segment_ids=LONG),
    case("labels of 33 bits", linear_cross_entropy, TOKENS, TOKENS[0], LONG, sentence="labels has 4294967297; it is"),
    of_model("a position behind", lambda model: model.hidden(IDS, positions=IDS[:, :1] + 2), "positions has 3; a seq"),
    of_model(
        "a position before", lambda model: model.hidden(IDS, positions=-IDS[:, :1]), "positions has -1; a sequence"
    ),
    of_model("a position twice", lambda model: model.hidden(IDS, positions=IDS), "positions has the same one twice"),
    cached("no cache", lambda cache: None, "LM.step: cache is NoneType None; it is a tuple."),
    cached("two layers' cache", lambda cache: cache * 2, "The cache is not one of this model"),
    cached(
        "a stacked cache", lambda cache: jax.tree.map(lambda x: x[None], cache), "/state' of the cache has shape (1, 1"
    ),
    of_model("half a cache", lambda model: model.init_cache(1, 2.5), "init_cache: max_len is float 2.5; it is an int."),
    of_model("true rows of a cache", lambda model: model.init_cache(True, 2), "batch is bool True; it is an int."),
    model("ids of one sequence", IDS[0], "ids is int32 (3,); it is an array of ints (B, T)."),
    model("documents of another length", IDS, "segment_ids is int32 (1, 2); it is", segment_ids=IDS[:, :2]),
    *(
        config("init_std", value, f"init_std is {value}; it is above 0, and finite.")
        for value in (0.0, math.nan, math.inf)
    ),
    config("dtype", "float16", "Unknown dtype 'float16': did you mean 'bfloat16'? Allowed: bfloat16, float32."),
)
