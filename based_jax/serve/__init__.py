"""Serving: a language model behind OpenAI's completions over HTTP (extra `serve`).

from based_jax.serve import Limits, bound, serve
"""

from based_jax.serve.limits import Limits
from based_jax.serve.server import bound, serve

__all__ = ["Limits", "bound", "serve"]
