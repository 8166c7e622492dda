"""Serve a trained language model over HTTP, as OpenAI's API of completions; pip install -e '.[serve]' brings it.

Only this machine reaches it unless --host says otherwise. Ctrl-C and SIGTERM let what is being written end first.

examples:
  python -m based_jax serve --workdir=runs/text
  python -m based_jax serve --hf=released/based-360m --dtype=bfloat16 --option=taylor.flush=16
  python -m based_jax serve --hf=released/based-360m --option=taylor.flush=16 --drafts=lookup:3
  python -m based_jax serve --workdir=runs/based_1b --mesh=tensor:2
  python -m based_jax serve --hf=released/based-360m --host=0.0.0.0 --port=80 --slots=32 --grace=60
"""

import argparse
import logging
import math
import os
from pathlib import Path
from typing import Any

from based_jax.commands.aot import parse_mesh
from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.parser import CommandParser, seconds
from based_jax.commands.text_models import (
    add_decoding_arguments,
    add_drafts_argument,
    add_model_arguments,
    decoder_of,
    drafts_of,
    load_text_model,
)
from based_jax.errors import UserError, installs

API_KEY_VARIABLE = "BASED_JAX_API_KEY"
LIMITS = {
    "slots": "texts that are written at once",
    "queue": "texts that wait for a slot; more are refused",
    "max_len": "tokens of a prompt with its continuation",
    "new_tokens": "tokens of a continuation",
    "prefix_bytes": "bytes of states of prompts, which others that begin alike go on from",
}
"""What may be asked at most, in the names of `serve.Limits`, which has the defaults."""
log = logging.getLogger(__name__)


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--name", help="of the model in requests (default: its folder's)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="likewise, 0 for one that is free (default: 8000)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what requests have to show (default: ${API_KEY_VARIABLE}, which no list of processes shows)",
    )
    for name, meaning in LIMITS.items():
        parser.add_argument(_flag(name), type=int, metavar="N", help=f"at most so many {meaning}")
    add_decoding_arguments(parser)
    add_drafts_argument(parser)
    parser.add_argument(
        "--mesh", default="", help="devices that share the texts or the model, as in data:2 or tensor:2"
    )
    parser.add_argument(
        "--grace", type=seconds, default=30.0, metavar="S", help="seconds to end in after a signal (default: 30)"
    )
    add_compiled_argument(parser)
    parser.details = _default_limits


def _flag(limit: str) -> str:
    return f"--{limit.replace('_', '-')}"


def _default_limits() -> str:
    """Return the limits that no argument changes."""
    Limits, *_ = _serving()
    return f"limits by default:\n  {' '.join(f'{_flag(name)}={getattr(Limits(), name)}' for name in LIMITS)}\n"


def _serving() -> tuple[Any, ...]:
    """Return what serves; UserError where a package is missing."""
    try:
        from based_jax.serve import Limits, bound, serve
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: {installs('serve')} brings it.") from None
    return Limits, bound, serve


def run(args: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    Limits, bound, serve = _serving()
    limits = Limits(**{name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None})
    api_key = _api_key(args)
    with bound(args.host, args.port) as listener:
        model, tokenizer = load_text_model(args)
        name, decoder = args.name or Path(args.workdir or args.hf).resolve().name, _placed(args, model)
        options = {"limits": limits, "api_key": api_key, "grace": args.grace, "drafts": drafts_of(args, tokenizer)}
        serve(decoder, tokenizer, name, listener, ready=_announce, **options)


def _placed(args: argparse.Namespace, model: Any) -> Any:
    """Return the model as it is to decode, over the mesh that the arguments name."""
    decoder = decoder_of(args, model)
    if not args.mesh:
        return decoder
    import jax

    from based_jax import parallel

    sizes = parse_mesh(args.mesh)
    return decoder.over(parallel.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())]))


def _api_key(args: argparse.Namespace) -> str | None:
    key = os.environ.get(API_KEY_VARIABLE) or None if args.api_key is None else args.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise UserError("The API key is empty or has more than printable ASCII; a header cannot hold it.")
    return key


def _announce(what: str) -> None:
    print(what, flush=True)
