"""Continue prompts with a trained language model.

examples:
  python -m based_jax generate --workdir=runs/text --prompt="It was a " --temperature=0.6
  python -m based_jax generate --hf=released/based-360m --prompt="The capital of France is" --max-new-tokens=8
"""

import argparse

from based_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="folder of a run on text")
    source.add_argument("--hf", help="folder with model.safetensors and config.json in the released layout")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the last good one)")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 keeps all tokens")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Print each prompt with its continuation."""
    from based_jax.generate import Sampling, generate

    model, tokenizer = _from_run(args.workdir, args.step) if args.workdir else _from_hf(args.hf)
    prompts = [tokenizer.encode(prompt) for prompt in args.prompt]
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    new = generate(model, prompts, args.max_new_tokens, sampling, stop=tokenizer.end_of_text, seed=args.seed)
    for prompt, ids in zip(args.prompt, new, strict=True):
        print(prompt + tokenizer.decode(ids))


def _from_run(workdir: str, step: int | None):
    from based_jax.data.tokenizer import get_tokenizer
    from based_jax.train.run import load_run
    from based_jax.train.tasks import TextTask

    config, _, model = load_run(workdir, step)
    if not isinstance(config.data, TextTask):
        raise UserError(f"'{workdir}' was trained on '{config.data.kind}'; generate needs a run on 'text'.")
    return model, get_tokenizer(config.data.tokenizer)


def _from_hf(folder: str):
    from based_jax.convert import load_hf
    from based_jax.data.tokenizer import get_tokenizer

    return load_hf(folder), get_tokenizer("gpt2")
