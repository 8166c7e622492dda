"""Text, tokenizers and synthetic tasks."""

from tests.bad_inputs.cases import Call, Command

CASES: tuple[Command | Call, ...] = ()
