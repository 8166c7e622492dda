"""The dimensions of the arrays of calls, by the names by which a mesh divides them.

The names are keys of `sharded.MESH_AXES`. Channels that do not meet are heads too.
"""

from typing import Any, NamedTuple

from based_jax.ops import calls, decode_calls

Names = tuple[str | None, ...]

TOKENS, BY_HEAD, BY_GROUP = ("batch", "time"), ("batch", "time", "heads"), ("batch", "time", "groups")
ROWS, STATE, HEADS = ("batch",), ("batch", "heads"), ("heads",)


class Dimensions(NamedTuple):
    """The names of the first dimensions of a call's arrays, those of its tokens first, and of its results."""

    arguments: dict[str, Names]
    results: tuple[Names, ...]


def _by_token(*fields: str, names: Names = BY_HEAD) -> dict[str, Names]:
    return dict.fromkeys(fields, names)


def _recurrent(arguments: dict[str, Names], state: Names = STATE) -> Dimensions:
    """Return those of a call that starts from a state and returns the one after it."""
    return Dimensions(arguments | {"state": state}, (next(iter(arguments.values())), state))


DIMENSIONS: dict[type, Dimensions] = {
    calls.AttentionCall: Dimensions(_by_token("q", "k", "v"), (BY_HEAD,)),
    calls.LinearAttentionCall: _recurrent(_by_token("q", "k", "v")),
    decode_calls.TaylorDecodeCall: Dimensions(
        _by_token("q", "k", "v", names=("batch", None, "heads")) | {"sums": STATE, "tokens": STATE, "length": ROWS},
        (("batch", None, "heads"), STATE, STATE, ROWS),
    ),
    calls.MatrixStateCall: _recurrent(_by_token("q", "k", "v", "log_decay", "beta", "a", "b") | {"bonus": HEADS}),
    calls.SlotAttentionCall: _recurrent(_by_token("q", "k", "v", "s", "log_decay")),
    calls.SSDCall: _recurrent(_by_token("x", "dt") | {"A": HEADS} | _by_token("B", "C", names=BY_GROUP)),
    calls.SelectiveScanCall: _recurrent(
        _by_token("u", "dt") | {"A": HEADS, "bias": HEADS} | _by_token("B", "C", names=TOKENS)
    ),
    calls.DiagonalSSMCall: _recurrent(_by_token("u") | dict.fromkeys(("log_a", "b", "c"), HEADS)),
    calls.Wkv4Call: _recurrent(_by_token("k", "v") | {"log_decay": HEADS, "bonus": HEADS}),
    calls.PositionsCall: _recurrent(_by_token("segment_ids", names=TOKENS), ROWS),
    calls.TokenShiftCall: _recurrent(_by_token("x", names=TOKENS), ROWS),
    calls.ShortConvCall: Dimensions(
        {"x": BY_HEAD, "kernel": (None, "heads"), "bias": HEADS, "state": ("batch", None, "heads")}, (BY_HEAD,)
    ),
    # halves of a projection that is cut lie on different devices
    calls.GatedConvCall: Dimensions({"x": TOKENS, "kernel": (), "bias": (), "state": ROWS}, (TOKENS,)),
    calls.LongConvCall: Dimensions({"u": BY_HEAD, "kernel": (None, "heads")}, (BY_HEAD,)),
}


def of(call: Any) -> Dimensions:
    """Return those of a call, which may have ids of documents besides."""
    found = DIMENSIONS[type(call)]
    ids = {"segment_ids": TOKENS} if "segment_ids" in call._fields else {}
    return found._replace(arguments=found.arguments | ids)


def have_heads(call: Any) -> bool:
    """Return whether a mesh can divide the channels of a call's tokens, which it would otherwise make whole."""
    return type(call) in DIMENSIONS and next(iter(DIMENSIONS[type(call)].arguments.values())) == BY_HEAD
