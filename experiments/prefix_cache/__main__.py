"""The first token of a prompt whose beginning was read before, against that of one that nobody has read.

python -m experiments.prefix_cache --config=configs/text_tiny.py --d-model=512    # on a CPU
python -m experiments.prefix_cache --config=configs/based.py:1b --out=experiments/prefix_cache/results/rows.jsonl
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx

from based_jax import compilation
from based_jax import config as configs
from based_jax.bench import rows
from based_jax.generate import Decoder, PrefixCache, Request, Scheduler
from based_jax.nn.lm import LM, LMConfig

PROMPT_TOKENS, SHARED_TOKENS = 4096, 4000
REPEATS = 5
BUDGET_BYTES = 16 * 2**30


def main() -> None:
    """Measure a model of random weights; print a table and append its rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="that of a model, as `train` takes it")
    parser.add_argument("--d-model", type=int, help="another width")
    parser.add_argument("--out", type=Path, help="file of rows, JSON lines, to append to")
    args = parser.parse_args()
    compilation.keep()
    with rows.appended(args.out) as write:
        for row in measure(random_decoder(args.config, args.d_model)):
            print(f"{row['prompt']:<28} {row['restored']:>6,} restored {1e3 * row['seconds']:>9.1f} ms", flush=True)
            write({"config": args.config, "d_model": args.d_model, **row, **rows.facts()})


def random_decoder(config: str, d_model: int | None) -> Decoder:
    """Return a model with random weights, which cost what trained ones do."""
    overrides = [] if d_model is None else [("model.d_model", str(d_model))]
    model = configs.build(LMConfig, configs.load(config, overrides).model)
    return Decoder.of(nnx.jit(lambda: LM(model, rngs=nnx.Rngs(0)))())


def measure(decoder: Decoder, repeats: int = REPEATS) -> Iterator[dict]:
    """Yield for each kind of prompt the median seconds to its first token; of a first round nothing is told."""
    rng, cache = np.random.default_rng(0), PrefixCache(BUDGET_BYTES)
    scheduler = Scheduler(decoder, slots=1, max_len=2 * PROMPT_TOKENS, block_tokens=1, prefix_cache=cache)
    without = Scheduler(decoder, slots=1, max_len=2 * PROMPT_TOKENS, block_tokens=1)
    scheduler.compile()
    found: dict[str, list[tuple[float, int]]] = {}
    for _ in range(1 + repeats):
        for name, scheduled, prompt in prompts(rng, scheduler, without, decoder.config.vocab_size):
            before = cache.metrics.tokens_restored
            seconds = first_token_seconds(scheduled, prompt)
            found.setdefault(name, []).append((seconds, cache.metrics.tokens_restored - before))
    for name, timed in found.items():
        seconds = statistics.median(seconds for seconds, _ in timed[1:])
        yield {"prompt": name, "prompt_tokens": PROMPT_TOKENS, "restored": timed[-1][1], "seconds": seconds}


def prompts(
    rng, scheduler: Scheduler, without: Scheduler, vocab_size: int
) -> Iterator[tuple[str, Scheduler, np.ndarray]]:
    """Yield prompts by what has been read of them, each with the scheduler that answers it."""

    def fresh() -> np.ndarray:
        return rng.integers(0, vocab_size, PROMPT_TOKENS)

    first = fresh()
    yield "new, no cache", without, fresh()
    yield "new", scheduler, first
    yield "the same again", scheduler, first
    for place in ("second", "third"):
        yield (
            f"{place} to share {SHARED_TOKENS:,}",
            scheduler,
            np.append(first[:SHARED_TOKENS], fresh()[SHARED_TOKENS:]),
        )


def first_token_seconds(scheduler: Scheduler, prompt: np.ndarray) -> float:
    """Return the time from a request to its first token."""
    begin = time.perf_counter()
    scheduler.submit(Request(prompt, 1))
    while not scheduler.advance():
        pass
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
