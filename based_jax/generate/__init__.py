"""Generation: continuations of prompts by a language model.

from based_jax.generate import Sampling, generate
"""

from based_jax.generate.engine import generate
from based_jax.generate.sampling import Sampling

__all__ = ["Sampling", "generate"]
