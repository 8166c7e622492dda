"""Each contract is broken by a mixer that breaks it: a check that cannot fail would be none."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.own_mixers import Sum

from based_jax.contracts import CONTRACTS, BrokenContractError, Fitting, Outcome, check
from based_jax.errors import UserError
from based_jax.nn import layers
from based_jax.ops import segments


class OverflowsAtTheThird(Sum):
    def __call__(self, x, segment_ids=None, positions=None):
        y = super().__call__(x, segment_ids)
        y = jnp.where(jnp.arange(x.shape[1])[None, :, None] >= 2, jnp.inf * y, y)
        return layers.at(positions, y)[0]


class ReturnsHalfAWidth(Sum):
    def __call__(self, x, segment_ids=None, positions=None):
        return super().__call__(x, segment_ids, positions)[..., ::2]


class SeesTheNext(Sum):
    def __call__(self, x, segment_ids=None, positions=None):
        return super().__call__(x + 0.1 * jnp.roll(x, -1, axis=1), segment_ids, positions)


class PassesOverPositions(Sum):
    def __call__(self, x, segment_ids=None, positions=None):
        y = super().__call__(x, segment_ids)
        return y if positions is None else y[:, : positions.shape[1]]


class StepsOtherwise(Sum):
    def _step(self, x, state):
        return self.out_proj(state), self.config.decay * state + x


class ForgetsBetweenPieces(Sum):
    def _prefill(self, x, state, segment_ids):
        return super()._prefill(x, None, segment_ids)


class TiresAfterManySteps(Sum):
    """Its pass forgets what stood 20 tokens before."""

    def __call__(self, x, segment_ids=None, positions=None):
        late = jnp.where(jnp.arange(x.shape[1])[None, :, None] >= 20, 2 * x, x)
        return super().__call__(late, segment_ids, positions)


class MixesDocuments(Sum):
    def _mix(self, x, state, segment_ids):
        present = None if segment_ids is None else (segments.ids_of(segment_ids) != 0).astype(jnp.int32)
        return super()._mix(x, state, present)


class CountsOutsideItsState(Sum):
    """Its state is in bf16 where it is kept, and its pass's is not."""

    def _initial_state(self, batch, max_len):
        return jnp.zeros((batch, self.d_model), jnp.bfloat16)

    def _average(self, x, state):
        state = self.config.decay * state.astype(jnp.float32) + x
        return state, state.astype(jnp.bfloat16)


class HasNoState(Sum):
    def _step(self, x, state):
        return self.out_proj(x), state


class GrowsWithoutEnd(Sum):
    """It says that its cache grows, and refuses nothing."""

    def state_size(self, seq_len):
        return self.d_model * seq_len


class TakesNoCacheSizes(Sum):
    def init_cache(self, batch, max_len):
        return super().init_cache(max(batch, 1), max(max_len, 1))


class NeedsPlainIds(Sum):
    def __call__(self, x, segment_ids=None, positions=None):
        first = None if segment_ids is None else segment_ids[:, :1] * jnp.ones(x.shape[:2], jnp.int32)
        return super().__call__(x, first, positions)


class TellsHalf(Sum):
    def state_size(self, seq_len):
        return self.d_model // 2


class TellsNoFlops(Sum):
    def flops_per_token(self, seq_len):
        return self.d_model


class ComputesInHalfOfBf16(Sum):
    def _average(self, x, state):
        h, state = super()._average(x, state)
        coarse = x.dtype == jnp.bfloat16
        return jnp.where(coarse, jnp.round(h * 4) / 4, h).astype(x.dtype), state


class FollowsTheDefaultTypes(Sum):
    def _initial_state(self, batch, max_len):
        return jnp.zeros((batch, self.d_model))


class HasNoAxes(Sum):
    def __init__(self, d_model, config, init):
        super().__init__(d_model, config, init)
        self.out_proj = nnx.Linear(d_model, d_model, use_bias=False, rngs=init.rngs)


class NamesParametersAtWill(Sum):
    def __init__(self, d_model, config, init):
        super().__init__(d_model, config, init)
        self.blend, self.lags = nnx.Param(jnp.ones(d_model)), nnx.Param(jnp.ones(d_model))


@dataclasses.dataclass(frozen=True)
class AnyConfig:
    decay: float = 0.9


class TakesAnyDecay(Sum):
    Config: ClassVar = AnyConfig


class ReadsAValue(Sum):
    """It looks at a parameter when it is built, so that all lanes have the first one's."""

    def __init__(self, d_model, config, init):
        super().__init__(d_model, config, init)
        self.scale = 1.0 if isinstance(self.out_proj.kernel[...], jax.core.Tracer) else _sign(self.out_proj.kernel[...])

    def __call__(self, x, segment_ids=None, positions=None):
        return self.scale * super().__call__(x, segment_ids, positions)


def _sign(kernel):
    return 1.0 + float(np.asarray(kernel)[0, 0])


BREAKS = {
    "finite outputs": (OverflowsAtTheThird, "Outputs are NaN or infinite from token 2 on."),
    "causal": (SeesTheNext, "changes output 0, which is before it"),
    "outputs at some positions": (PassesOverPositions, "Outputs at positions are off by"),
    "prefill and steps": (StepsOtherwise, "Outputs of steps alone are off by"),
    "prefill in pieces": (ForgetsBetweenPieces, "after pieces of (4, 1, 4) tokens are off by"),
    "many steps": (TiresAfterManySteps, "Outputs of 40 steps are off by"),
    "documents and padding": (MixesDocuments, "Outputs of documents in prefills and steps are off by"),
    "documents after tokens without one": (MixesDocuments, "Outputs of documents in prefills and steps are off by"),
    "saved states": (HasNoState, "5 tokens leave the state as it was"),
    "no room": (GrowsWithoutEnd, "A prefill of 5 tokens into a cache for 4 is not refused"),
    "impossible caches": (TakesNoCacheSizes, "A cache of (9, 0) is not refused"),
    "ids of a model": (NeedsPlainIds, "tuple indices must be integers or slices"),
    "state size": (TellsHalf, "state_size(7) is 8, but the cache of a sequence has 16 elements"),
    "FLOPs": (TellsNoFlops, "flops_per_token is 16, but 256 weights are read once for each token"),
    "bf16": (ComputesInHalfOfBf16, "In bf16 outputs are off by"),
    "64-bit types": (FollowsTheDefaultTypes, "A cache has arrays of float64"),
    "axes of parameters": (HasNoAxes, "A mesh divides none of the parameters over its axis tensor"),
    "names of parameters": (NamesParametersAtWill, "Parameter 'blend', 'lags' is in none of optim.PARAMETER_GROUPS"),
    "impossible options": (TakesAnyDecay, "decay is -1.0, and is not refused"),
    "lanes": (ReadsAValue, "Outputs of several lanes are off by"),
}


def broken(contract, mixer):
    """Return what is wrong, whatever error says it."""
    try:
        CONTRACTS[contract](Fitting(mixer))
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_contract_is_broken_by_this_mixer(contract):
    mixer, sentence = BREAKS[contract]
    assert sentence in broken(contract, mixer)


def test_a_mixer_that_keeps_all_is_told_so():
    lines = []
    assert check(Sum, report=lines.append) == []
    assert lines == [f"kept    {contract}" for contract in CONTRACTS]


def test_what_is_broken_is_told_with_the_reason():
    lines = []
    [first, *_] = check(TellsHalf, report=lines.append)
    assert first == Outcome("state size", "state_size(7) is 8, but the cache of a sequence has 16 elements.")
    assert f"broken  state size: {first.broken}" in lines
    with pytest.raises(BrokenContractError):
        CONTRACTS["state size"](Fitting(TellsHalf))


def test_outputs_of_another_width_are_told_first():
    [first, *_] = check(ReturnsHalfAWidth, report=print)
    assert first == Outcome("finite outputs", "Outputs have shape (9, 9, 8) of inputs (9, 9, 16).")


class RaisesInSteps(Sum):
    def _step(self, x, state):
        raise ValueError("no steps yet")


def test_an_error_is_told_with_its_place_in_the_file_of_the_mixer():
    line = RaisesInSteps._step.__code__.co_firstlineno + 1
    [first, *_] = check(RaisesInSteps, report=print)
    assert first.broken == f"ValueError: no steps yet (test_broken_mixers.py:{line})"


class NeedsMore(Sum):
    def __init__(self, d_model, config, init):
        super().__init__(d_model, config, init)
        self.table = config.size


def test_what_cannot_be_built_is_told_in_a_sentence():
    with pytest.raises(
        UserError,
        match=r"^NeedsMore cannot be built at width 16: AttributeError: .* 'size' \(test_broken_mixers\.py:\d+\)\.$",
    ):
        check(NeedsMore, report=print)
