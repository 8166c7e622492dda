"""What a model of text writes while it is trained."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from based_jax.config import check_types
from based_jax.data.tokenizer_file import named_tokenizer
from based_jax.errors import UserError
from based_jax.generate import Sampling, generate
from based_jax.generate.text import encode_prompt

Sampler = Callable[[nnx.State, int], list[tuple[str, str]]]
"""From (params, step), the seed of the draws, to each prompt with what the model adds to it."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Prompts and how to go on from them.

    Attributes:
      prompts: texts to continue; an empty one begins a document.
      max_new_tokens: tokens to add, at most.
      temperature, top_k, top_p: as in `generate.Sampling`.
    """

    prompts: tuple[str, ...] = ("",)
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_types(self)
        if not self.prompts:
            raise UserError("samples.prompts is empty; it has at least one prompt, '' to begin a document.")
        if self.max_new_tokens < 1:
            raise UserError(f"samples.max_new_tokens is {self.max_new_tokens}; it is at least 1.")
        _ = self.sampling  # an impossible value is named here

    @property
    def sampling(self) -> Sampling:
        """How the next token is drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p)


def sampler(config: SampleConfig, tokenizer_name: str, graphdef: nnx.GraphDef, mesh: Mesh) -> Sampler:
    """Return the sampler of a model of this structure on a mesh."""
    tokenizer = named_tokenizer(tokenizer_name)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in config.prompts]

    def sample(params: nnx.State, step: int) -> list[tuple[str, str]]:
        model, n, stop = nnx.merge(graphdef, params), config.max_new_tokens, tokenizer.end_of_text
        with jax.set_mesh(mesh):
            new = generate(model, prompts, n, config.sampling, stop=stop, seed=step)
        return [(prompt, tokenizer.decode(ids)) for prompt, ids in zip(config.prompts, new, strict=True)]

    return sample
