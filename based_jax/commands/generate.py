"""Continue prompts with a trained language model, and show the text as it is drawn.

The draws of a prompt depend on the seed and on its number among the prompts, not on the others. An empty prompt begins
a document.

examples:
  python -m based_jax generate --workdir=runs/text --prompt="It was a " --temperature=0.6
  python -m based_jax generate --hf=released/based-360m --prompt="The capital of France is" --max-new-tokens=8
  python -m based_jax generate --workdir=runs/text --prompt= --stop="." --top-p=0.9 --temperature=0.8 --log-probs
  python -m based_jax generate --hf=released/based-360m --prompt="The capital" --flush=16 --state-dtype=bfloat16
  python -m based_jax generate --workdir=runs/text --prompt="A" --option=window.window=32 --dtype=float32
  python -m based_jax generate --workdir=runs/text --prompt="$(cat article.txt)" --save-state=article.safetensors
  python -m based_jax generate --workdir=runs/text --prompt="$(cat article.txt)" --drafts=lookup:4
  python -m based_jax generate --workdir=runs/text --prompt="A" --drafts=runs/small:4
  python -m based_jax generate --workdir=runs/text --load-state=article.safetensors --prompt="In short: "
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.distributed import add_distributed_arguments
from based_jax.commands.parser import CommandParser
from based_jax.commands.text_models import (
    add_decoding_arguments,
    add_drafts_argument,
    add_model_arguments,
    decoder_of,
    drafts_of,
    load_text_model,
)
from based_jax.errors import UserError

if TYPE_CHECKING:
    from based_jax.data.tokenizer import Tokenizer
    from based_jax.generate import Decoder, Event, Request
    from based_jax.generate.task import Work


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 keeps all tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument(
        "--stop-id",
        action="append",
        type=int,
        default=[],
        metavar="ID",
        help="end before this id, as before the end of a text; may be given several times",
    )
    parser.add_argument("--log-probs", action="store_true", help="list the tokens with their log-probabilities")
    add_decoding_arguments(parser)
    add_drafts_argument(parser)
    parser.add_argument("--save-state", metavar="FILE", help="write the state after the one prompt to a new file")
    parser.add_argument("--load-state", metavar="FILE", help="each prompt goes on from the state of a file")
    add_distributed_arguments(parser)
    add_compiled_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Print each prompt with its continuation as it comes; those behind the first wait until their turn."""
    from based_jax.generate import Request, Sampling, State, stream
    from based_jax.generate.text import encode_prompt

    _check_save_state(args)
    for number, prompt in enumerate(args.prompt):
        _check_text(number, prompt)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    state = None if args.load_state is None else State.load(args.load_state)
    model, tokenizer = load_text_model(args)
    requests = [
        Request(
            encode_prompt(tokenizer, prompt),
            args.max_new_tokens,
            sampling,
            stop_ids=(tokenizer.end_of_text, *args.stop_id),
            stop_strings=tuple(args.stop),
            seed=args.seed,
            row_id=number,
            state=state,
        )
        for number, prompt in enumerate(args.prompt)
    ]
    decoder, drafts = decoder_of(args, model), drafts_of(args, tokenizer)
    if args.flush is not None or args.state_dtype is not None or args.option:
        longest = max(request.length for request in requests) + args.max_new_tokens
        print(f"State of a sequence: {decoder.state_bytes(longest):,} bytes.", file=sys.stderr)
    if args.save_state is not None:
        requests = [_with_saved_state(decoder, requests[0], args.save_state)]
    works: list[Work] = []
    events = _noted(stream(decoder, requests, tokenizer=tokenizer, drafts=drafts), works)
    _print(events, args.prompt, tokenizer if args.log_probs else None)
    if drafts is not None:
        print(_told(works), file=sys.stderr)


def _noted(events: "Iterator[Event]", works: "list[Work]") -> "Iterator[Event]":
    """Yield events, and note what their tokens took."""
    for event in events:
        works.append(event.work)
        yield event


def _told(works: "Sequence[Work]") -> str:
    """Return how many of the drafted tokens were right, in a sentence."""
    steps, drawn, offered = (sum(counts) for counts in zip(*works, strict=True))
    return f"{offered} tokens were drafted and {drawn - steps} right: {drawn} in {steps} steps."


def _check_save_state(args: argparse.Namespace) -> None:
    """Raise UserError for a file of a state that cannot be written, or that several prompts are to be written to."""
    from based_jax.folders import check_free, local_path

    if args.save_state is None:
        return
    if len(args.prompt) > 1:
        raise UserError(f"--save-state writes the state of one prompt, and there are {len(args.prompt)}.")
    check_free(local_path(args.save_state, "--save-state"))


def _with_saved_state(decoder: "Decoder", request: "Request", file: str) -> "Request":
    """Write the state after a prompt; return a request of its last token, which goes on from those before it."""
    from based_jax.generate import state_after

    ids = request.checked(decoder, decoder.max_len).prompt
    before = state_after(decoder, ids[:-1], request.state)
    state_after(decoder, ids[-1:], before).save(file)
    return dataclasses.replace(request, prompt=ids[-1:], state=before)


def _print(events: "Iterator[Event]", prompts: Sequence[str], lister: "Tokenizer | None") -> None:
    """Write the texts in order, that whose turn it is as it comes; with a tokenizer list the tokens of each."""
    unwritten, turn, ended = list(prompts), 0, set[int]()
    drawn: list[list[tuple[int, float]]] = [[] for _ in prompts]
    for event in events:
        unwritten[event.id] += event.text
        drawn[event.id] += zip(event.tokens, event.log_probs, strict=True)
        ended |= {event.id} if event.finish else set()
        while turn < len(prompts):
            print(unwritten[turn], end="", flush=True)
            unwritten[turn] = ""
            if turn not in ended:
                break
            print()
            if lister:
                for token, log_prob in drawn[turn]:
                    print(f"{log_prob:9.4f} {lister.decode([token])!r}")
            turn += 1


def _check_text(number: int, prompt: str) -> None:
    """Raise UserError for bytes of the command line that are no UTF-8, which Python hands on as lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"Prompt {number} is {prompt!r:.60}, which is no UTF-8 text.") from None
