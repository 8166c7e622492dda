"""The operations that are checked, as functions of dictionaries of arrays, and what one case of them is."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct

from based_jax.ops import (
    conv,
    cross_entropy,
    delta_rule,
    gated_conv,
    gated_linear_attention,
    norm,
    selective_scan,
    softmax,
    taylor,
)
from experiments.kernels import oracles

SHORTEST = 72
"""Tokens that an oracle is compiled for, so that one serves many lengths."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and its gradients.

    Attributes:
      operation: key of `OPERATIONS`.
      shape: (B, H, T), or (B, D, T) where there are no heads.
      dims: (K, V), (taps,), (states of a channel,), or (tokens of the vocabulary,).
      state: from an initial state, and with a gradient of the final one.
      documents: packed ones, with padding.
      window: keys that a query sees.
      values: "plain", "late" or "large" (`cases.FACTORS`).
      through: "call", "vmap" or "shard_map".
      quick: part of the quick set.
    """

    operation: str
    shape: tuple[int, int, int]
    dims: tuple[int, ...] = ()
    state: bool = False
    documents: bool = False
    window: int | None = None
    values: str = "plain"
    through: str = "call"
    quick: bool = False

    def __str__(self) -> str:
        words = [self.operation, str(self.shape).replace(" ", "")] + ["x".join(map(str, self.dims))] * bool(self.dims)
        words += [f"window={self.window}"] * (self.window is not None)
        words += ["state"] * self.state + ["documents"] * self.documents
        return " ".join(words + [x for x in (self.values, self.through) if x not in ("plain", "call")])

    def rng(self, seed: int) -> np.random.Generator:
        """Return the case's own source of random numbers."""
        return np.random.default_rng([seed, zlib.crc32(str(self).encode())])


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation as functions of (arrays, ids), a dictionary and the documents or None, to a dictionary.

    Attributes:
      table: its implementations.
      arrays: function of a case that returns the shapes of the arrays that are differentiated.
      run: function of a case and an implementation's name.
      oracle: function of a case; it takes a state and ids always.
      weights: names of the arrays that belong to no row of a batch.
      kernel: name of the implementation that is checked where none is named.
    """

    table: Mapping[str, Any]
    arrays: Callable[[Case], dict[str, ShapeDtypeStruct]]
    run: Callable[[Case, str], Callable]
    oracle: Callable[[Case], Callable]
    weights: frozenset[str] = frozenset()
    kernel: str = "hopper"


def _heads(case: Case) -> dict[str, ShapeDtypeStruct]:
    (batch, heads, time), (k, v) = case.shape, case.dims
    widths = {"q": k, "k": k, "v": v}
    return {name: ShapeDtypeStruct((batch, time, heads, width), jnp.bfloat16) for name, width in widths.items()}


def _taylor_arrays(case: Case) -> dict[str, ShapeDtypeStruct]:
    (batch, heads, _), (k, v) = case.shape, case.dims
    state = ShapeDtypeStruct((batch, heads, taylor.expanded_dim(k), v + 1), jnp.float32)
    return _heads(case) | {"state": state}


def _taylor(case: Case, impl: str) -> Callable:
    def call(arrays, ids):
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        options = {"state": arrays.get("state"), "segment_ids": ids, "return_state": True, "impl": impl}
        return dict(zip(("o", "state"), taylor.taylor_attention(q, k, v, **options), strict=True))

    return call


def _window(case: Case, impl: str) -> Callable:
    def call(arrays, ids):
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        return {"o": softmax.window_attention(q, k, v, window=case.window, segment_ids=ids, impl=impl)}

    return call


def _conv_arrays(case: Case, halves: int = 1) -> dict[str, ShapeDtypeStruct]:
    (batch, channels, time), [taps] = case.shape, case.dims
    wide = {"x": (batch, time, halves * channels), "state": (batch, taps, channels)}
    weights = {"kernel": (taps, channels), "bias": (halves * channels,)}
    found = {name: ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in wide.items()}
    return found | {name: ShapeDtypeStruct(shape, jnp.float32) for name, shape in weights.items()}


def _conv(case: Case, impl: str, function: Callable) -> Callable:
    def call(arrays, ids):
        options = {"bias": arrays["bias"], "state": arrays.get("state"), "segment_ids": ids, "impl": impl}
        return {"y": function(arrays["x"], arrays["kernel"], **options)}

    return call


def _norm_of(*names: str) -> Operation:
    """Return the norm that takes these arrays: RMS norm, or layer norm where there is a bias."""

    def arrays(case: Case) -> dict[str, ShapeDtypeStruct]:
        batch, channels, time = case.shape
        tokens, weights = (batch, time, channels), ShapeDtypeStruct((channels,), jnp.float32)
        found = {"r": ShapeDtypeStruct(tokens, jnp.float32), "y": ShapeDtypeStruct(tokens, jnp.bfloat16)}
        return {name: found.get(name, weights) for name in names}

    def run(case: Case, impl: str) -> Callable:
        def call(arrays, ids):
            given = [arrays.get(name) for name in ("r", "y", "scale")]
            options = {"dtype": jnp.bfloat16, "impl": impl}
            if "bias" in arrays:
                r, x = norm.residual_layer_norm(*given, arrays["bias"], **options)
            else:
                r, x = norm.residual_rms_norm(*given, **options)
            return {"r": r, "x": x}

        return call

    weights = frozenset({"scale", "bias"} & set(names))
    return Operation(norm.IMPLEMENTATIONS, arrays, run, lambda case: oracles.residual_norm, weights=weights)


def _scan_arrays(case: Case) -> dict[str, ShapeDtypeStruct]:
    (batch, channels, time), [states] = case.shape, case.dims
    narrow = {"u": (batch, time, channels), "B": (batch, time, states), "C": (batch, time, states)}
    wide = {"dt": (batch, time, channels), "A": (channels, states), "state": (batch, channels, states)}
    found = {name: ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in narrow.items()}
    return found | {name: ShapeDtypeStruct(shape, jnp.float32) for name, shape in wide.items()}


def _scan(case: Case, impl: str) -> Callable:
    def call(arrays, ids):
        dt, A = oracles.steps_and_rates(arrays["dt"], arrays["A"])
        options = {"state": arrays.get("state"), "segment_ids": ids, "return_state": True, "impl": impl}
        y, state = selective_scan.selective_scan(arrays["u"], dt, A, arrays["B"], arrays["C"], **options)
        return {"y": y, "state": state}

    return call


def _gated_arrays(case: Case) -> dict[str, ShapeDtypeStruct]:
    (batch, heads, time), (k, v) = case.shape, case.dims
    shapes = {"g": (batch, time, heads, k), "state": (batch, heads, k, v)}
    return _heads(case) | {name: ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _delta_arrays(case: Case) -> dict[str, ShapeDtypeStruct]:
    found = _gated_arrays(case)
    return found | {"direction": found["g"]}


def _gated(case: Case, impl: str) -> Callable:
    def call(arrays, ids):
        q, k, v, g = (arrays[name] for name in ("q", "k", "v", "g"))
        options = {"state": arrays.get("state"), "segment_ids": ids, "return_state": True, "impl": impl}
        log_decay, a, b = oracles.decays_and_directions(g, arrays.get("direction", g))
        if "direction" in arrays:
            o, state = delta_rule.dplr(q, k, v, log_decay, a, b, **options)
        else:
            o, state = gated_linear_attention.gated_linear_attention(q, k, v, log_decay, **options)
        return {"o": o, "state": state}

    return call


def _simple_arrays(case: Case) -> dict[str, ShapeDtypeStruct]:
    found = _gated_arrays(case)
    return found | {"g": ShapeDtypeStruct((*found["g"].shape[:3], 1), jnp.float32)}


def _gated_delta_arrays(case: Case) -> dict[str, ShapeDtypeStruct]:
    found = _simple_arrays(case)
    return found | {"beta": found["g"]}


def _gated_delta(case: Case, impl: str) -> Callable:
    def call(arrays, ids):
        k, log_decay, rate = oracles.keys_and_rates(*(arrays[name] for name in ("k", "g", "beta")))
        options = {"state": arrays.get("state"), "segment_ids": ids, "return_state": True, "impl": impl}
        o, state = delta_rule.delta_rule(arrays["q"], k, arrays["v"], log_decay, rate, **options)
        return {"o": o, "state": state}

    return call


def _entropy_arrays(case: Case) -> dict[str, ShapeDtypeStruct]:
    (batch, channels, time), [vocab] = case.shape, case.dims
    shapes = {"hidden": (batch, time, channels), "table": (vocab, channels)}
    return {name: ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}


def _entropy(case: Case, impl: str) -> Callable:
    def call(arrays, ids):
        hidden = arrays["hidden"] * jnp.asarray(oracles.SCALE, arrays["hidden"].dtype)
        ids = jnp.ones(hidden.shape[:2], jnp.int32) if ids is None else ids
        labels = oracles.labels(ids, case.dims[0])
        losses, _ = cross_entropy.linear_cross_entropy(hidden, arrays["table"], labels, impl=impl)
        return {"losses": losses[..., None]}

    return call


OPERATIONS = {
    "taylor_attention": Operation(
        taylor.IMPLEMENTATIONS, _taylor_arrays, _taylor, lambda case: oracles.taylor_attention
    ),
    "window_attention": Operation(
        softmax.WINDOW_ATTENTION,
        _heads,
        _window,
        lambda case: functools.partial(oracles.window_attention, window=case.window),
    ),
    "gated_short_conv": Operation(
        gated_conv.IMPLEMENTATIONS,
        functools.partial(_conv_arrays, halves=2),
        functools.partial(_conv, function=gated_conv.gated_short_conv),
        lambda case: oracles.gated_short_conv,
        weights=frozenset({"kernel", "bias"}),
    ),
    "short_conv": Operation(
        conv.IMPLEMENTATIONS,
        _conv_arrays,
        functools.partial(_conv, function=functools.partial(conv.short_conv, silu=True)),
        lambda case: oracles.short_conv,
        weights=frozenset({"kernel", "bias"}),
    ),
    "residual_rms_norm": _norm_of("r", "y", "scale"),
    "residual_layer_norm": _norm_of("r", "y", "scale", "bias"),
    "rms_norm": _norm_of("r", "scale"),
    "layer_norm": _norm_of("r", "scale", "bias"),
    "selective_scan": Operation(
        selective_scan.IMPLEMENTATIONS,
        _scan_arrays,
        _scan,
        lambda case: oracles.selective_scan,
        weights=frozenset({"A"}),
    ),
    "gated_linear_attention": Operation(
        gated_linear_attention.IMPLEMENTATIONS, _gated_arrays, _gated, lambda case: oracles.recurrence
    ),
    "delta_rule": Operation(delta_rule.DPLR_IMPLEMENTATIONS, _delta_arrays, _gated, lambda case: oracles.recurrence),
    "delta_rule_by_chunks": Operation(
        delta_rule.DPLR_IMPLEMENTATIONS, _delta_arrays, _gated, lambda case: oracles.recurrence, kernel="triton_chunks"
    ),
    "gated_linear_attention_by_chunks": Operation(
        gated_linear_attention.IMPLEMENTATIONS,
        _gated_arrays,
        _gated,
        lambda case: oracles.recurrence,
        kernel="triton_chunks",
    ),
    "simple_gla": Operation(
        gated_linear_attention.IMPLEMENTATIONS,
        _simple_arrays,
        _gated,
        lambda case: oracles.recurrence,
        kernel="triton_chunks",
    ),
    "gated_delta_rule": Operation(
        delta_rule.IMPLEMENTATIONS,
        _gated_delta_arrays,
        _gated_delta,
        lambda case: oracles.gated_delta_rule,
        kernel="triton_chunks",
    ),
    "linear_cross_entropy": Operation(
        cross_entropy.IMPLEMENTATIONS,
        _entropy_arrays,
        _entropy,
        lambda case: oracles.linear_cross_entropy,
        weights=frozenset({"table"}),
    ),
}


def same_program(case: Case) -> Case:
    """Return what stands for all cases with the same compiled call."""
    return dataclasses.replace(case, values="plain", quick=False)


def basic(case: Case) -> Case:
    """Return what stands for all cases with the same compiled oracle, which fills up short sequences with padding."""
    batch, width, time = case.shape
    shape = batch, width, max(time, SHORTEST)
    return Case(case.operation, shape, case.dims, state=True, window=case.window)


def arrays_of(case: Case) -> dict[str, ShapeDtypeStruct]:
    """Return the shapes of what a case differentiates."""
    found = OPERATIONS[case.operation].arrays(case)
    return {name: x for name, x in found.items() if name != "state" or case.state}


def outputs_of(case: Case) -> dict[str, ShapeDtypeStruct]:
    """Return the shapes of what a case returns."""
    ids = ShapeDtypeStruct(case.shape[::2], jnp.int32)
    return jax.eval_shape(OPERATIONS[case.operation].run(case, "xla"), arrays_of(case), ids)


def gradients_of(case: Case) -> dict[str, ShapeDtypeStruct]:
    """Return the shapes of the outputs' gradients that a case is given."""
    return {name: x for name, x in outputs_of(case).items() if name != "state" or case.state}
