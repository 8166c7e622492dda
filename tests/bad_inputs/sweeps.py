"""Sweep files and stores."""

from tests.bad_inputs.cases import Call, Command

CASES: tuple[Command | Call, ...] = ()
