"""Weights in and out."""

from tests.bad_inputs.cases import Call, Command

CASES: tuple[Command | Call, ...] = ()
