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
from based_jax.commands.text_models import add_model_arguments, load_text_model
from based_jax.errors import UserError


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
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
    model, tokenizer = load_text_model(args)
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
