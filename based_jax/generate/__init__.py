"""Generation: continuations of prompts by a language model.

from based_jax.generate import Sampling, generate
"""

from based_jax.generate.decoder import Decoder
from based_jax.generate.drafts import Drafts
from based_jax.generate.engine import generate, stream
from based_jax.generate.prefix_cache import PrefixCache
from based_jax.generate.requests import Request
from based_jax.generate.sampling import Sampling
from based_jax.generate.scheduler import Scheduler
from based_jax.generate.state import State
from based_jax.generate.state_layout import state_after
from based_jax.generate.task import Event

__all__ = [
    "Decoder",
    "Drafts",
    "Event",
    "PrefixCache",
    "Request",
    "Sampling",
    "Scheduler",
    "State",
    "generate",
    "state_after",
    "stream",
]
