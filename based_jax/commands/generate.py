"""Continue prompts with a trained language model, and show the text as it is drawn.

The draws of a prompt depend on the seed and on its number among the prompts, not on the others. An empty prompt begins
a document.

examples:
  python -m based_jax generate --workdir=runs/text --prompt="It was a " --temperature=0.6
  python -m based_jax generate --hf=released/based-360m --prompt="The capital of France is" --max-new-tokens=8
  python -m based_jax generate --workdir=runs/text --prompt= --stop="." --top-p=0.9 --temperature=0.8 --log-probs
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.distributed import add_distributed_arguments
from based_jax.commands.parser import CommandParser
from based_jax.errors import UserError

if TYPE_CHECKING:
    from based_jax.data.tokenizer import Tokenizer
    from based_jax.generate import Event


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="folder of a run on text")
    source.add_argument("--hf", help="folder with config.json and safetensors or pytorch_model.bin")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the last good one)")
    parser.add_argument(
        "--tokenizer", help="bytes, gpt2 or a tokenizer.json (default: that of the run, or that the folder names)"
    )
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
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
    parser.add_argument("--dtype", help="what layers compute in, bfloat16 or float32 (default: that of the model)")
    add_distributed_arguments(parser)
    add_compiled_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Print each prompt with its continuation as it comes; those behind the first wait until their turn."""
    from based_jax.generate import Decoder, Request, Sampling, stream
    from based_jax.generate.text import encode_prompt

    for number, prompt in enumerate(args.prompt):
        _check_text(number, prompt)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    model, tokenizer = _from_hf(args) if args.workdir is None else _from_run(args)
    requests = [
        Request(
            encode_prompt(tokenizer, prompt),
            args.max_new_tokens,
            sampling,
            stop_ids=(tokenizer.end_of_text, *args.stop_id),
            stop_strings=tuple(args.stop),
            seed=args.seed,
            row_id=number,
        )
        for number, prompt in enumerate(args.prompt)
    ]
    events = stream(Decoder.of(model, args.dtype), requests, tokenizer=tokenizer)
    _print(events, args.prompt, tokenizer if args.log_probs else None)


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


def _from_run(args: argparse.Namespace):
    from based_jax.data.tokenizer_file import named_tokenizer
    from based_jax.train.run import load_run
    from based_jax.train.tasks import TextTask

    config, _, model = load_run(args.workdir, args.step)
    if not isinstance(config.data, TextTask):
        raise UserError(f"'{args.workdir}' was trained on '{config.data.kind}'; generate needs a run on 'text'.")
    return model, named_tokenizer(args.tokenizer or config.data.tokenizer)


def _from_hf(args: argparse.Namespace):
    from based_jax.convert import load_hf
    from based_jax.convert.tokenizers import folder_tokenizer
    from based_jax.data.tokenizer_file import named_tokenizer

    if args.step is not None:
        raise UserError(f"--step is {args.step}, but a folder has no steps; leave it out, or give --workdir.")
    tokenizer = folder_tokenizer(args.hf) if args.tokenizer is None else named_tokenizer(args.tokenizer)
    return load_hf(args.hf), tokenizer
