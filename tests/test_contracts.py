"""What each mixer promises. A new mixer needs no line here unless its defaults are too large for width 16.

The contracts themselves stand in `based_jax/contracts/`, where mixers from outside the package are held to them too.
"""

import dataclasses

import pytest
from flax import nnx
from helpers.small_mixers import SMALL

from based_jax.contracts import CONTRACTS, Fitting
from based_jax.errors import UserError
from based_jax.nn.mixer import Mixer
from based_jax.nn.mixers import MIXERS, make_mixer

COMPARED_ELSEWHERE = "lanes"  # in nn/mixers/test_meshes.py

# All tests of a mixer after each other: they share what is compiled.
each_mixer = pytest.mark.parametrize("kind", MIXERS, scope="module")


@each_mixer
@pytest.mark.parametrize("contract", [name for name in CONTRACTS if name != COMPARED_ELSEWHERE])
def test_a_mixer_keeps_its_contract(kind, contract, rng):
    CONTRACTS[contract](Fitting(kind, SMALL.get(kind), rng=rng))


@each_mixer
def test_an_unknown_option_is_told_with_what_is_meant(kind):
    name = dataclasses.fields(MIXERS[kind].Config)[0].name
    with pytest.raises(UserError, match=f"Unknown option of mixer '{kind}' '{name}l': did you mean '{name}'"):
        make_mixer(kind, 16, rngs=nnx.Rngs(0), **{f"{name}l": 1})


@each_mixer
def test_declares_what_it_is(kind):
    mixer = MIXERS[kind]
    assert issubclass(mixer, Mixer)
    assert "Source: " in mixer.__doc__
    assert mixer.Config.__dataclass_params__.frozen
    mixer.Config()
