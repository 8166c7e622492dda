"""Prompts and how to go on from them."""

import numpy as np
from flax import nnx

from based_jax.generate import Sampling, generate
from based_jax.nn.lm import LM, LMConfig
from tests.bad_inputs.cases import Call, Command

GENERATE = ("generate", "--workdir=<text_run>")
MODEL = nnx.eval_shape(lambda: LM(LMConfig((("conv", {}),), d_model=8, vocab_size=50), rngs=nnx.Rngs(0)))
"""A model without arrays: what is refused needs none."""


def prompts(name, value, sentence):
    """Return the case of other prompts."""
    return Call(name, lambda folder: generate(MODEL, value, 4), sentence)


def option(name, sentence, new=4, sampling=None, **options):
    """Return the case of a good prompt and another option."""
    sampling = Sampling() if sampling is None else sampling
    return Call(name, lambda folder: generate(MODEL, [[1, 2]], new, sampling, **options), sentence)


def sampling(name, sentence, **options):
    """Return the case of another distribution."""
    return Call(name, lambda folder: Sampling(**options), sentence)


CASES: tuple[Command | Call, ...] = (
    Command("top_p above 1", (*GENERATE, "--prompt=a", "--top-p=2"), "top_p is 2.0"),
    Command("no new tokens", (*GENERATE, "--prompt=a", "--max-new-tokens=0"), "max_new_tokens is 0"),
    Command("a word for a number", (*GENERATE, "--prompt=a", "--max-new-tokens=few"), "invalid int value: 'few'"),
    Command("an empty stop", (*GENERATE, "--prompt=a", "--stop="), "A stop string is ''; it is a text of at least"),
    Command("a stop id of the padding", (*GENERATE, "--prompt=a", "--stop-id=257"), "stop is 257; it is a token id"),
    Command(
        "a flush without Taylor layers",
        (*GENERATE, "--prompt=a", "--flush=16"),
        "flush is 16, but the model has no Taylor layer; leave it out.",
    ),
    Command(
        "drafts of no number", (*GENERATE, "--prompt=a", "--drafts=lookup"), "--drafts is 'lookup'; it is lookup:N or"
    ),
    Command(
        "drafts of too many", (*GENERATE, "--prompt=a", "--drafts=lookup:99"), "99 tokens are to be drafted at once"
    ),
    Command("drafts of no run", (*GENERATE, "--prompt=a", "--drafts=<new>:4"), "'<new>' is neither a run nor a folder"),
    Command("drafts of MQAR", (*GENERATE, "--prompt=a", "--drafts=<mqar_run>:4"), "generate needs a run on 'text'."),
    Command("an unknown dtype", (*GENERATE, "--prompt=a", "--dtype=float16"), "'float16'"),
    Command(
        "bytes that are no text",
        (*GENERATE, "--prompt=a", "--prompt=\udcff"),
        "Prompt 1 is '\\udcff', which is no UTF-8",
    ),
    Command("a seed of 65 bits", (*GENERATE, "--prompt=a", f"--seed={2**64}"), "A seed is 18446744073709551616; it is"),
    Command("a seed below 0", (*GENERATE, "--prompt=a", "--seed=-1"), "A seed is -1; it is an integer from 0 to"),
    Command("a temperature of nan", (*GENERATE, "--prompt=a", "--temperature=nan"), "temperature is nan; it is 0 for"),
    Command(
        "new tokens without end", (*GENERATE, "--prompt=a", f"--max-new-tokens={10**12}"), "it is at most 2147483646."
    ),
    Command(
        "another model's tokenizer", (*GENERATE, "--prompt=a cat", "--tokenizer=gpt2"), "the model knows ids 0 to 256."
    ),
    Command(
        "two states for one file",
        (*GENERATE, "--prompt=a", "--prompt=b", "--save-state=<new>"),
        "--save-state writes the state of one prompt, and there are 2.",
    ),
    Command(
        "a state over a file", (*GENERATE, "--prompt=a", "--save-state=<text.py>"), "is not empty; name a new one."
    ),
    Command("no state", (*GENERATE, "--prompt=a", "--load-state=<new>"), "<new>' cannot be read as a state: No such"),
    Command("a text for a state", ("state", "inspect", "<text.py>"), "<text.py>' cannot be read as a state: "),
    Command("both a run and a folder", (*GENERATE, "--hf=<tmp>", "--prompt=a"), "not allowed with argument"),
    prompts("no prompts", [], "There is no prompt; give at least one."),
    prompts("an array of no prompts", np.zeros((0, 3), int), "There is no prompt"),
    prompts("a string for prompts", "a cat", "prompts is the string 'a cat'; it is a list of prompts"),
    prompts("prompts of strings", ["a cat"], "Prompt 0 is the string 'a cat'; it is a list of token ids"),
    prompts("a number for prompts", 3, "prompts is 3; it is a list of prompts"),
    prompts("a flat list", [1, 2, 3], "Prompt 0 is 1; it is a list of token ids."),
    prompts("a flat array", np.asarray([1, 2, 3]), "Prompt 0 is "),
    prompts("prompts of two axes", [np.zeros((2, 3), int)], "Prompt 0 is an array of shape (2, 3); it is a list of"),
    prompts("a mask over prompts", np.ma.masked_array([[1, 2]], [[0, 1]]), "prompts is masked_array("),
    prompts("prompts by name", {"a": [1]}, "prompts is {'a': [1]}; it is a list of prompts"),
    prompts("a set of ids", [{1, 2}], "Prompt 0 is {1, 2}; it is a list of token ids."),
    Call("no model", lambda folder: generate(None, [[1]], 4), "model is None; it is an LM."),
    prompts("nested lists", [[[1], [2]]], "Prompt 0 has [1]; token ids are integers."),
    prompts("an empty list among others", [[1], []], "Prompt 1 is empty; it needs at least one token."),
    prompts("ids with halves", [[1, 2.5]], "Prompt 0 has 2.5; token ids are integers."),
    prompts("an array of floats", np.ones((1, 2)), "Prompt 0 has 1.0; token ids are integers."),
    prompts("ids of truth", [[True, 2]], "Prompt 0 has True; token ids are integers."),
    prompts("ids as digits", [["1", "2"]], "Prompt 0 has '1'; token ids are integers."),
    prompts("nothing for an id", [[1, None]], "Prompt 0 has None; token ids are integers."),
    prompts("an id below 0", [[1, -1]], "Prompt 0 has id -1; the model knows ids 0 to 49."),
    prompts("an id of the padding", [[50]], "Prompt 0 has id 50; the model knows ids 0 to 49."),
    prompts("an id of 70 bits", [[2**70]], "Prompt 0 has id 1180591620717411303424; the model knows"),
    option("half a token", "max_new_tokens is 2.5; it is at least 1.", new=2.5),
    option("a true number of tokens", "max_new_tokens is True; it is at least 1.", new=True),
    option("tokens in words", "max_new_tokens is '4'; it is at least 1.", new="4"),
    option("a number for sampling", "sampling is 0.7; it is a Sampling, as in", sampling=0.7),
    option("a stop in words", "stop is 'end'; it is a token id, 0 to 49, or None.", stop="end"),
    option("a stop of the padding", "stop is 50; it is a token id, 0 to 49, or None.", stop=50),
    option("seeds in a set", "seed is {1}; it is an integer for each row.", seed={1}),
    option("seeds of two axes", "seed is array([[1], [2]]); it is an integer for each row.", seed=np.array([[1], [2]])),
    option("bytes for row ids", "row_ids is b'1'; it is an integer for each row.", row_ids=b"1"),
    option("a seed with a half", "seed is 0.5; it is an integer for each row.", seed=0.5),
    option("a seed of nothing", "seed is None; it is an integer for each row.", seed=None),
    option("too many seeds", "seed has 2 values for 1 prompts; it has one for each.", seed=[1, 2]),
    option("a seed too large for a row", "A seed is 18446744073709551616", seed=[2**64]),
    option("a row's id below 0", "A row id is -1; it is an integer from 0 to 4294967295.", row_ids=[-1]),
    option("no row ids", "row_ids has 0 values for 1 prompts", row_ids=[]),
    sampling("a temperature below 0", "temperature is -1; it is 0 for greedy, or above.", temperature=-1),
    sampling("an infinite temperature", "temperature is inf; it is 0 for greedy", temperature=float("inf")),
    sampling("a temperature in words", "temperature is '1'; it is 0 for greedy", temperature="1"),
    sampling("top_k below 0", "top_k is -1; it is 0 for all tokens", top_k=-1),
    sampling("half of top_k", "top_k is 2.5; it is 0 for all tokens", top_k=2.5),
    sampling("top_p of nan", "top_p is nan; it is above 0", top_p=float("nan")),
    sampling("top_p in words", "top_p is '0.9'; it is above 0", top_p="0.9"),
)
