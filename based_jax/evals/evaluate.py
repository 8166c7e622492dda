"""Loss, perplexity and accuracy of a model on named segments of evaluation batches."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from flax import nnx

from based_jax.nn.lm import LM
from based_jax.nn.loss import loss_sums


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[nnx.State, Mapping], dict[str, jax.Array]]:
    """Return `eval_step(params, batch)`, the jitted sums of `nn.loss.loss_sums`."""

    @jax.jit
    def eval_step(params, batch):
        return loss_sums(nnx.merge(graphdef, params), batch)

    return eval_step


def evaluate(sums_of: Callable[[Mapping], Mapping], batches: Iterable[tuple[str, Mapping]]) -> dict[str, float]:
    """Return metrics over all batches, and per segment where there are several.

    Args:
      sums_of: sums of one batch; see `nn.loss.loss_sums`.
      batches: (segment name, batch) pairs.

    Returns:
      "loss" in nats per labelled token, "perplexity" and "accuracy"; with several segments also "<name>/accuracy" and
      "<name>/loss". The overall numbers weigh every labelled token the same, "accuracy_by_segment" every segment.
    """
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, batch in batches:
        for key, value in jax.device_get(sums_of(batch)).items():
            totals[name][key] += float(value)
    metrics = _means(_sum(totals.values()))
    if len(totals) > 1:
        by_segment = {name: _means(sums) for name, sums in totals.items()}
        metrics["accuracy_by_segment"] = float(np.mean([means["accuracy"] for means in by_segment.values()]))
        for name, means in by_segment.items():
            metrics |= {f"{name}/{key}": means[key] for key in ("loss", "accuracy")}
    return metrics


def model_sums(model: LM) -> Callable[[Mapping], Mapping]:
    """Return the `sums_of` of a model for `evaluate`."""
    graphdef, params = nnx.split(model)
    eval_step = make_eval_step(graphdef)
    return lambda batch: eval_step(params, batch)


def _sum(totals: Iterable[Mapping[str, float]]) -> dict[str, float]:
    summed: dict[str, float] = defaultdict(float)
    for sums in totals:
        for key, value in sums.items():
            summed[key] += value
    return summed


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    count = max(sums["count"], 1.0)
    loss = sums["loss"] / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": sums["correct"] / count}
