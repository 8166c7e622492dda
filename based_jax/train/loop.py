"""The training loop, in reading order: set up, resume, step, evaluate, save, stop."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from based_jax import config as configs
from based_jax import optim, parallel
from based_jax.errors import UserError
from based_jax.evals.evaluate import evaluate, make_eval_step
from based_jax.train import data_record
from based_jax.train.checkpoint import Checkpoints
from based_jax.train.compile import train_program
from based_jax.train.metrics import MetricWriter, Timer, progress
from based_jax.train.preemption import Preemption
from based_jax.train.run import Facts, TrainConfig

# What may differ when a run is continued: nothing that its numbers depend on (another mesh, and the microbatches that
# it can divide, sum in another order, which may change their last bits).
KEYS_FREE_ON_RESUME = (
    "log_every",
    "eval_every",
    "checkpoint",
    "mesh",
    "microbatches",
    "data.path",  # `data_record` compares the text itself
    "data.cache_dir",
)


class DivergedError(UserError):
    """The loss or the gradient of a step was not finite."""


def train(config: TrainConfig, workdir: str | Path) -> dict[str, float]:
    """Train to `config.steps`, continuing from the workdir's last good checkpoint, and return the final evaluation.

    The workdir gets config.json, metrics.jsonl, TensorBoard events and checkpoints; a row and a checkpoint of step n
    are those after n updates. On SIGTERM the run saves and returns early with no evaluation; the same call continues
    it, on CPU to bitwise the same numbers as an unbroken run.

    Args:
      config: the run.
      workdir: a new folder, or one that this config made.

    Raises:
      UserError: bad input or a full disk.
      DivergedError: a loss that is not finite; its state is not saved.
    """
    timer = Timer()
    workdir = Path(workdir)
    config = dataclasses.replace(config, data=config.data.located)
    mesh = parallel.make_mesh(config.mesh)
    program = train_program(config, mesh)
    source = config.data.open(config.batch_size, jax.process_index(), jax.process_count())
    program.check_step(source.batch(0))  # what no operation can run is refused before anything is written
    configs.check_same(config, workdir, free=KEYS_FREE_ON_RESUME)
    data_record.check_same(source, workdir)
    configs.save(config, workdir)
    data_record.save(source, workdir)

    eval_step = make_eval_step(program.graphdef)

    def run_eval(params) -> dict[str, float]:
        batches = ((name, batch) for name in source.eval_names for batch in source.eval_batches(name))
        with jax.set_mesh(mesh):
            return evaluate(lambda batch: eval_step(params, parallel.global_batch(batch, mesh)), batches)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config.checkpoint))
        if checkpoints.latest() is None:
            start, state = 0, program.initial_state()
        else:
            start, state = checkpoints.restore(program.abstract_state)
        report = stack.enter_context(contextlib.closing(Report(config, workdir, start, checkpoints)))
        preemption = stack.enter_context(Preemption())
        for line in source.summary:
            report.say(line)
        timer.done("init")
        results: dict[str, float] = {}

        for step in range(start + 1, config.steps + 1):
            batch = parallel.global_batch(source.batch(step - 1), mesh)
            timer.done("data")

            state, metrics = program.step(state, batch)
            report.step(step, metrics, batch["inputs"].size)
            timer.done("step")

            last, stop = step == config.steps, preemption.reached(step)
            if last or (config.eval_every and step % config.eval_every == 0):
                report.flush()  # the time of the evaluation is no part of the steps' throughput
                results = run_eval(state.params)
                report.evaluation(step, results)
                timer.done("eval")

            if last or stop or checkpoints.due(step):
                report.flush()  # a state is saved only after its own step has been seen to be finite
                checkpoints.save(step, state, wait=stop)
                timer.done("checkpoint")
            if stop and not last:
                report.say(f"Stopped by a signal; step {step} is saved, and the same command continues from it.")
                return {}

        if start < config.steps:
            report.times(timer.split())
        return results or run_eval(state.params)


class Report:
    """Writes what the loop tells, one step late: the host reads a step's metrics while the next one runs.

    Only process 0 writes; every process stops at a loss that is not finite.
    """

    def __init__(self, config: TrainConfig, workdir: Path, start: int, checkpoints: Checkpoints):
        self._config, self._checkpoints = config, checkpoints
        self._lr = optim.schedule(config.optim, config.steps)
        self._facts: dict[int, Facts] = {}
        self._pending: tuple[int, Mapping[str, jax.Array], int] | None = None
        self._tokens, self._since = 0, time.monotonic()
        self._writer = self._progress = None
        if jax.process_index() == 0:
            self._writer = MetricWriter(workdir, first_step=start + 1)
            self._progress = progress(config.steps, start)

    def step(self, step: int, metrics: Mapping[str, jax.Array], tokens: int) -> None:
        """Take the metrics of a step that was dispatched, and write those of the one before.

        Raises:
          UserError: the loss or the gradient of the step before is not finite.
        """
        self.flush()
        self._pending = (step, metrics, tokens)

    def flush(self) -> None:
        """Read and write the step that is pending, if any; raises as `step`."""
        if self._pending is None:
            return
        (step, on_device, tokens), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(dict(on_device)).items()}
        if not all(map(math.isfinite, metrics.values())):
            self._stop(step, metrics)
        self._tokens += tokens
        if step % self._config.log_every == 0 or step == self._config.steps:
            self._write_step(step, metrics, tokens)

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Write an evaluation, and count throughput from here."""
        self._write(step, {f"eval/{name}": value for name, value in results.items()})
        shown = {f"eval {name}": results[name] for name in ("loss", "perplexity", "accuracy")}
        self.say(f"step {step} " + " ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        self._tokens, self._since = 0, time.monotonic()

    def times(self, split: Mapping[str, float]) -> None:
        """Write where the wall time went, as part of the last step's rows."""
        self._write(self._config.steps, split)

    def say(self, message: str) -> None:
        """Print a line."""
        if self._progress:
            self._progress.say(message)

    def close(self) -> None:
        """Close the files."""
        if self._writer and self._progress:
            self._progress.close()
            self._writer.close()

    def _write_step(self, step: int, metrics: Mapping[str, float], tokens: int) -> None:
        now = time.monotonic()
        seq_len = tokens // self._config.batch_size
        if seq_len not in self._facts:
            self._facts[seq_len] = Facts.of(self._config, seq_len)
        throughput = self._facts[seq_len].row(self._tokens / max(now - self._since, 1e-9))
        self._tokens, self._since = 0, now
        self._write(step, {**metrics, "lr": float(self._lr(step - 1)), **throughput})
        if self._progress:
            shown = {name: metrics[name] for name in ("loss", "accuracy")}
            self._progress.update(step, shown | {"tokens/s": round(throughput["tokens_per_second"])})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._writer:
            self._writer.write(step, values)

    def _stop(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write(step, metrics)
        last = self._checkpoints.latest()
        good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last}"
        raise DivergedError(
            f"The loss of step {step} is {metrics['loss']} and its gradient norm {metrics['grad_norm']}: the run stops,"
            f" nothing of it was saved, and {good}."
        )
