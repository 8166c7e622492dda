"""Calls of operations, mixers and models."""

from tests.bad_inputs.cases import Call, Command

CASES: tuple[Command | Call, ...] = ()
