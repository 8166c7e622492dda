"""What a trained attention recalls when its cache keeps fewer tokens than there were, by policy and bytes.

    python -m based_jax sweep run experiments/cache_policies/sweep.py --store=STORE
    python -m experiments.cache_policies measure STORE    # rows that are not in results/policies.jsonl
    python -m experiments.cache_policies picture          # results/policies.png, .svg and .pdf

Every model reads the test's rows token by token, as in generation, and its predictions there are counted.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

from based_jax.labels import is_labelled
from based_jax.nn.accounting import ELEMENT_BYTES
from based_jax.nn.lm import LM
from based_jax.nn.lm_config import LMConfig, with_options
from based_jax.pictures import panels, paper, styles
from based_jax.revision import revision
from based_jax.store import Store
from based_jax.train.run import load_run

RESULTS = Path(__file__).parent / "results"
POLICIES = "window", "streaming", "h2o", "roco"
BUDGETS = 6, 8, 12, 16, 24, 32, 48, 64
TRAINED = "trained so"
"""The policy of a mixer that decodes as it was trained."""
ALL_TOKENS = "attention, all tokens"
RING: dict[str, Any] = {"mfc": "none", "ms": 8, "ls": "", "zorder": 3, "clip_on": False}
CAPTION = (
    "MQAR with 64 tokens and 8 pairs, two layers, D 64; fp32 bytes of the second layer's cache. Attention: mean of two "
    "seeds; trained so: with this little state, one seed."
)


def with_cache(config: LMConfig, policy: str, budget: int) -> LMConfig:
    """Return the model in which attention keeps a budget of tokens."""
    return with_options(config, [f"attention.cache_policy={policy}", f"attention.cache_budget={budget}"])


def abstract_model(config: LMConfig) -> LM:
    """Return a model without values."""
    return nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))


def state_bytes(config: LMConfig, seq_len: int) -> int:
    """Return the fp32 bytes that the last mixer's cache has after so many tokens, statistics included."""
    return ELEMENT_BYTES * abstract_model(config).mixers()[-1].state_size(seq_len)


def recall(config: LMConfig, params: nnx.State, batches: Iterable[Any]) -> float:
    """Return the share of right predictions where there are labels, of rows that are read token by token."""
    graphdef = nnx.graphdef(abstract_model(config))

    @jax.jit
    def predictions(params, inputs):
        model = nnx.merge(graphdef, params)

        def read(cache, ids):
            hidden, cache = model.step(ids, cache)
            return cache, jnp.argmax(model.logits(hidden), axis=-1)

        return jax.lax.scan(read, model.init_cache(*inputs.shape), inputs.T)[1].T

    right, asked = 0, 0
    for batch in batches:
        there = is_labelled(batch["labels"])
        right += int(np.sum(there & (np.asarray(predictions(params, batch["inputs"])) == batch["labels"])))
        asked += int(np.sum(there))
    return right / asked


def measure(store: Path, known: Collection[tuple]) -> Iterator[dict[str, Any]]:
    """Yield a row for each trained model, and for each policy and budget of those with attention, that is not known."""
    for run in sorted(Store(store).ids()):
        config, step, model = load_run(store / "runs" / run)
        source = config.data.open(config.batch_size)
        batches = [batch for name in source.eval_names for batch in source.eval_batches(name)]
        seq_len, params = batches[0]["inputs"].shape[1], nnx.state(model)
        mixer, options = config.model.layers[-1]
        caches = [(TRAINED, None)]
        if mixer == "attention":
            caches += [(policy, budget) for policy in POLICIES for budget in BUDGETS]
        for policy, budget in caches:
            if (run, policy, budget) in known:
                continue
            made = config.model if budget is None else with_cache(config.model, policy, budget)
            yield {
                "run": run,
                "mixer": mixer,
                "options": dict(options),
                "policy": policy,
                "budget": budget,
                "seed": config.seed,
                "steps": step,
                "state_bytes": state_bytes(made, seq_len),
                "accuracy": round(recall(made, params, batches), 4),
            }


def mean_accuracies(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return a line of means by bytes for each policy, for all tokens and for each mixer trained with less."""
    lines: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        lines.setdefault(_line_name(row), {}).setdefault(row["state_bytes"], []).append(row["accuracy"])
    return {name: sorted((size, float(np.mean(y))) for size, y in line.items()) for name, line in lines.items()}


def _line_name(row: dict[str, Any]) -> str:
    if row["policy"] != TRAINED:
        return f"attention, {row['policy']}"
    return ALL_TOKENS if row["mixer"] == "attention" else f"{row['mixer']}, {TRAINED}"


def picture(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Draw accuracy against bytes; a ring about the point of all tokens, on which policies that keep all lie."""
    means = mean_accuracies(rows)
    accuracies = [y for line in means.values() for _, y in line]
    with matplotlib.rc_context(styles.PAPER):
        figure = paper.sheet(4.5, panels.panels_inches(accuracies), means, [CAPTION])
        [panel] = panels.accuracy_panels(figure, 1, accuracies, diverged=False)
        for (name, line), style in zip(means.items(), styles.styles(means).values(), strict=True):
            ring = RING if name == ALL_TOKENS else {}
            panel.line(*zip(*line, strict=True), label=name, **styles.marked(style.colour, style.marker) | ring)
        panel.axes.set_xlabel("state of a sequence")
        panels.byte_axis(panel.axes, [size for line in means.values() for size, _ in line], 4.0)
        paper.add_legend(figure, panel.axes)
        return paper.save(figure, path)


def main() -> None:
    """Write each row as it is found, or draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "picture"])
    parser.add_argument("store", type=Path, nargs="?", help="of the sweep")
    args = parser.parse_args()
    file = RESULTS / "policies.jsonl"
    found = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    if args.what == "picture":
        print(*picture(found, RESULTS / "policies"))
        return
    if args.store is None:
        parser.error("measure needs the sweep's STORE")
    command = " ".join(["python -m experiments.cache_policies", *sys.argv[1:]])
    facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "revision": revision(), "command": command}
    if not Store(args.store).ids():
        parser.error(f"'{args.store}' has no row of a sweep; `python -m based_jax sweep run` fills it")
    known = {key(row) for row in found}
    before = len(known)
    for row in measure(args.store, frozenset(known)):
        known.add(key(row))
        print(row, flush=True)
        with file.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row | facts) + "\n")
    print(f"{len(known) - before} rows added to {file}.")


def key(row: dict[str, Any]) -> tuple:
    """Return what a row is told from others by."""
    return row["run"], row["policy"], row["budget"]


if __name__ == "__main__":
    main()
