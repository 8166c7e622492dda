"""Prompts and how to go on from them."""

from tests.bad_inputs.cases import Call, Command

GENERATE = ("generate", "--workdir=<text_run>")

CASES: tuple[Command | Call, ...] = (
    Command("top_p above 1", (*GENERATE, "--prompt=a", "--top-p=2"), "top_p is 2.0"),
    Command("no new tokens", (*GENERATE, "--prompt=a", "--max-new-tokens=0"), "max_new_tokens is 0"),
    Command("a word for a number", (*GENERATE, "--prompt=a", "--max-new-tokens=few"), "invalid int value: 'few'"),
    Command("an empty prompt", (*GENERATE, "--prompt="), "Prompt 0 is empty"),
)
