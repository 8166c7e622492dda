"""Continue prompts with a trained language model.

The draws of a prompt depend on the seed and on its number among the prompts, not on the others.

examples:
  python -m based_jax generate --workdir=runs/text --prompt="It was a " --temperature=0.6
  python -m based_jax generate --hf=released/based-360m --prompt="The capital of France is" --max-new-tokens=8
"""

import argparse

from based_jax.commands.compiled import add_compiled_argument
from based_jax.commands.distributed import add_distributed_arguments
from based_jax.commands.parser import CommandParser
from based_jax.errors import UserError


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
    add_distributed_arguments(parser)
    add_compiled_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Print each prompt with its continuation."""
    from based_jax.generate import Sampling, generate

    for number, prompt in enumerate(args.prompt):
        _check_text(number, prompt)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    model, tokenizer = _from_hf(args) if args.workdir is None else _from_run(args)
    prompts = [tokenizer.encode(prompt) for prompt in args.prompt]
    new = generate(model, prompts, args.max_new_tokens, sampling, stop=tokenizer.end_of_text, seed=args.seed)
    for prompt, ids in zip(args.prompt, new, strict=True):
        print(prompt + tokenizer.decode(ids))


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
