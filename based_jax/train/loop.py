"""The training loop, in reading order: set up, resume, step, evaluate, save, stop."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from based_jax import config as configs
from based_jax import optim, parallel
from based_jax.errors import UserError
from based_jax.evals.evaluate import evaluate, make_eval_step
from based_jax.folders import UnwritableError, reason
from based_jax.ops import dispatch
from based_jax.train import continuation, data_record
from based_jax.train.agreement import check_alike
from based_jax.train.checkpoint import Checkpoints, SavedCheckpoints
from based_jax.train.compile import TrainProgram, train_program
from based_jax.train.goodput import Timer, TimesFile
from based_jax.train.init_from import InitFrom, read_parameters
from based_jax.train.memory import check_batch_fits, check_state_fits
from based_jax.train.metrics import MetricWriter, has_evaluation, progress
from based_jax.train.opening import opening_lines
from based_jax.train.preemption import AgreedStop, Preemption
from based_jax.train.read_ahead import read_ahead
from based_jax.train.run import Facts, TrainConfig
from based_jax.train.samples import Sampler, sampler
from based_jax.train.step import TrainState
from based_jax.train.tasks import Source, TextTask
from based_jax.train.workdir import CHECKPOINTS_FOLDER, checked_workdir, held


class DivergedError(UserError):
    """The loss or the gradient of a step was not finite."""


class UnreadableError(UserError):
    """The data of a run cannot be read, or are not as they were written."""


Turn = Callable[[TrainProgram, TrainState], contextlib.AbstractContextManager]
"""What a run that shares its devices waits in for its turn, with what it trains and the state that it begins with."""


def train(config: TrainConfig, workdir: str | os.PathLike, turn: Turn | None = None) -> dict[str, float]:
    """Train to `config.steps`, continuing from the workdir's last good checkpoint, and return the final evaluation.

    The workdir gets config.json, metrics.jsonl, TensorBoard events and checkpoints; a row and a checkpoint of step n
    are those after n updates. On SIGTERM the run saves and returns early with no evaluation, on Ctrl-C it saves and
    raises KeyboardInterrupt; the same call continues it, on CPU to bitwise the same numbers as an unbroken one.

    Args:
      config: the run.
      workdir: a new folder, or that of a run of this config; `continuation.MAY_CHANGE` lists what may differ.
      turn: entered when step and evaluation are compiled, and left when the run ends; None to begin at once.

    Raises:
      UserError: bad input, another training in the same workdir, damaged data or a full disk; what can be saved is.
      DivergedError: a loss that is not finite; its state is not saved.
      KeyboardInterrupt: Ctrl-C, with a sentence on what is saved.
    """
    timer = Timer()
    workdir = checked_workdir(workdir)
    config = dataclasses.replace(config, data=config.data.located)
    check_alike({"workdir": str(workdir.absolute())} | continuation.values_of_all(config))
    mesh = parallel.make_mesh(config.mesh)
    config, kept = continuation.sized(config, mesh, workdir)
    changed = [*kept, *continuation.changes(config, workdir)]
    program = train_program(config, mesh)
    check_state_fits(program.abstract_state)
    check_batch_fits(config, mesh)
    feed = parallel.Feed(mesh, config.batch_size)
    source = config.data.open(config.batch_size, feed.rows)
    with dispatch.recorded_choices() as choices:
        program.check_step(source.batch(0))  # what no operation can run is refused before anything is written
    data_record.check_same(source, workdir)
    check_alike({"the text's fingerprint": source.record.get("fingerprint")})
    taken, origin = _parameters_to_begin_with(config, workdir, program)
    sample = _sampler(config, program)
    eval_step = make_eval_step(program.graphdef)

    def run_eval(params, preemption: Preemption) -> dict[str, float]:
        """Return the evaluation; nothing where a signal comes meanwhile."""
        batches = ((name, batch) for name in source.eval_names for batch in source.eval_batches(name))
        heard = _until_asked(batches, preemption)
        try:
            with jax.set_mesh(mesh), _reading():
                return evaluate(lambda batch: eval_step(params, feed.arrays(batch)), heard)
        except _EvaluationStopped:
            return {}

    def read(step: int) -> dict[str, jax.Array]:
        with _reading():
            return feed.arrays(source.batch(step))

    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(held(workdir))
            configs.save(config, workdir)
            data_record.save(source, workdir)
        preemption = stack.enter_context(Preemption())
        checkpoints = stack.enter_context(Checkpoints(workdir / CHECKPOINTS_FOLDER, config.checkpoint))
        if checkpoints.latest() is None:
            start, state = 0, program.initial_state(taken)
        else:
            start, state = checkpoints.restore(program.abstract_state)
        if turn is not None:
            _compile_ahead(program, state, eval_step, source, feed)
            stack.enter_context(turn(program, state))
        report = stack.enter_context(Report(config, workdir, start, checkpoints, timer))
        for line in (*opening_lines(program, source, choices), *origin, *changed):
            report.say(line)
        report.begin()
        timer.done("init")
        step, results = start, {}
        if start < config.steps and preemption.reached(start):
            return _stopped(start, preemption, report)
        left_out = start and _evaluates(config, start) and not has_evaluation(workdir, start)
        if parallel.first_process_says(left_out):
            if not (results := run_eval(state.params, preemption)):
                return _stopped(start, preemption, report)
            report.evaluation(start, results)

        batches = stack.enter_context(read_ahead(read, range(start, config.steps)))
        try:
            for step, batch in enumerate(batches, start + 1):
                timer.done("data")

                state, metrics = program.step(state, batch)
                report.step(step, metrics, batch["inputs"].size)
                timer.done("step" if step > start + 1 else "compile")

                last, stop = step == config.steps, preemption.reached(step)
                if _evaluates(config, step):
                    report.flush()  # the time of the evaluation is no part of the steps' throughput
                    if results := run_eval(state.params, preemption):
                        report.evaluation(step, results)
                    stop = stop or not results
                    timer.done("eval")

                if config.sample_every and step % config.sample_every == 0:
                    report.flush()
                    report.samples(step, sample(state.params, step))
                    timer.done("eval")

                if last or stop or checkpoints.due(step):
                    report.flush()  # a state is saved only after its own step has been seen to be finite
                    if last or stop or not report.skipping:
                        checkpoints.save(step, state, wait=stop)
                    timer.done("checkpoint")
                    report.times(step)
                if stop and not (last and results):
                    return _stopped(step, preemption, report)
        except (UnreadableError, UnwritableError) as error:
            report.last_words()
            raise _saved_in_spite_of(error, checkpoints, step, state) from error

        return results or run_eval(state.params, preemption) or _stopped(step, preemption, report)


def _compile_ahead(
    program: TrainProgram, state: TrainState, eval_step: Any, source: Source, feed: parallel.Feed
) -> None:
    """Compile what batches like the first ones need; the calls that come find it done."""
    program.lower_step(source.batch(0)).compile()
    first = next((batch for name in source.eval_names for batch in source.eval_batches(name)), None)
    if first is not None:
        with jax.set_mesh(program.mesh):
            eval_step.lower(state.params, feed.arrays(first)).compile()


def _evaluates(config: TrainConfig, step: int) -> bool:
    """Return whether a run evaluates after a step."""
    return step == config.steps or (config.eval_every is not None and step % config.eval_every == 0)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turn what is wrong with data, or with their disk, into `UnreadableError`."""
    try:
        yield
    except UserError as error:
        raise UnreadableError(str(error)) from error
    except OSError as error:
        raise UnreadableError(f"The data cannot be read: {reason(error)}.") from error


class _EvaluationStopped(Exception):
    """A signal came while a run evaluated."""


def _until_asked[T](batches: Iterable[T], preemption: Preemption) -> Iterator[T]:
    """Yield batches until a signal asks this process to stop; many processes evaluate to the end together."""
    for batch in batches:
        if preemption.asked and jax.process_count() == 1:
            raise _EvaluationStopped
        yield batch


def _parameters_to_begin_with(
    config: TrainConfig, workdir: Path, program: TrainProgram
) -> tuple[Mapping[str, jax.Array], list[str]]:
    """Return the parameters that a new run takes from `config.init_from`, and what to say of them."""
    if (
        not isinstance(config.init_from, InitFrom)
        or SavedCheckpoints(workdir / CHECKPOINTS_FOLDER).latest() is not None
    ):
        return {}, []
    taken, line = read_parameters(config.init_from, config.model, program.abstract_state.params)
    return taken, [line]


def _sampler(config: TrainConfig, program: TrainProgram) -> Sampler:
    if config.sample_every is None or not isinstance(config.data, TextTask):
        return lambda params, step: []
    if jax.process_count() > 1:
        raise UserError(f"sample_every is {config.sample_every}, but the run has several processes; it is None there.")
    return sampler(config.samples, config.data.tokenizer, program.graphdef, program.mesh)


def _stopped(step: int, preemption: Preemption, report: "Report") -> dict[str, float]:
    """Say that the run was stopped, and return no evaluation; raise KeyboardInterrupt if Ctrl-C asked for it."""
    saved = f"step {step} is saved" if step else "no step was taken"
    saved += ", and the same command continues from it."
    if preemption.interrupted:
        raise AgreedStop(f"Stopped by Ctrl-C; {saved}")
    report.say(f"Stopped by a signal; {saved}")
    return {}


def _saved_in_spite_of(error: UserError, checkpoints: Checkpoints, step: int, state: TrainState) -> UserError:
    """Save the state of a run that can neither read nor write on, if that can be; return the sentence on both.

    Of several processes the others are in the next step by then: the checkpoint before is what there is.
    """
    told = str(error).removesuffix(".")
    try:
        if jax.process_count() > 1:
            step = checkpoints.latest() or 0
        elif step:
            checkpoints.save(step, state, wait=True)
    except UserError as second:
        return UserError(f"{told}, and the state is not saved: {second}")
    saved = f"step {step} is saved, and the same command continues from it" if step else "no step is saved"
    return UserError(f"{told}; {saved}.")


class Report(contextlib.AbstractContextManager):
    """Writes what the loop tells, one step late: the host reads a step's metrics while the next one runs.

    Only process 0 writes; every process stops at a loss that is not finite, or after `config.max_skipped_steps` of them
    in a row.
    """

    def __init__(self, config: TrainConfig, workdir: Path, start: int, checkpoints: Checkpoints, timer: Timer):
        self._config, self._start, self._checkpoints, self._timer = config, start, checkpoints, timer
        self._skipped_in_a_row = 0
        self._lr = optim.schedule(config.optim, config.steps)
        self._facts: dict[int, Facts] = {}
        self._pending: tuple[int, Mapping[str, jax.Array], int] | None = None
        self._tokens, self._since = 0, time.monotonic()
        self._writer = self._progress = self._times = None
        if jax.process_index() == 0:
            self._times = TimesFile(workdir, start, timer)
            self._writer = MetricWriter(workdir, first_step=start + 1)
            self._progress = progress(config.steps, start)

    def __exit__(self, *exc_info):
        if self._writer and self._progress and self._times:
            self._progress.close()
            self._times.__exit__(*exc_info)
            self._writer.__exit__(*exc_info)

    def begin(self) -> None:
        """Say where the run starts, and which of its rows no checkpoint holds."""
        if self._writer and self._writer.set_aside:
            self.say(f"rows after step {self._start}, of which no checkpoint is left: {self._writer.set_aside}")
        if self._start == self._config.steps:
            self.say(f"step {self._start} is the last one: evaluating")
            return
        self.say(f"continuing from step {self._start}" if self._start else "starting at step 0")
        self.say("compiling; the first step follows")

    @property
    def skipping(self) -> bool:
        """Whether the last step that was read was skipped: no loss of the state has been seen to be finite."""
        return self._skipped_in_a_row > 0

    def step(self, step: int, metrics: Mapping[str, jax.Array], tokens: int) -> None:
        """Take the metrics of a step that was dispatched, and write those of the one before.

        Raises:
          UserError: the loss or the gradient of the step before is not finite, or the disk is full.
        """
        before, self._pending = self._pending, (step, metrics, tokens)
        self._take(before)

    def flush(self) -> None:
        """Read and write the step that is pending, if any; raises as `step`."""
        pending, self._pending = self._pending, None
        self._take(pending)

    def last_words(self) -> None:
        """Read the step that is pending, if any, and write it if that can be.

        Raises:
          DivergedError: as `step`.
        """
        with contextlib.suppress(UnwritableError):
            self.flush()

    def _take(self, pending: tuple[int, Mapping[str, jax.Array], int] | None) -> None:
        if pending is None:
            return
        step, on_device, tokens = pending
        metrics = self._read(step, on_device)
        self._tokens += tokens
        if step == self._start + 1 and self._progress:
            self._progress.begin(step)
        if step % self._config.log_every == 0 or step == self._config.steps:
            self._write_step(step, metrics, tokens)

    def _read(self, step: int, on_device: Mapping[str, jax.Array]) -> dict[str, float]:
        """Return the metrics of a step on the host; raise if they are not finite and no more may be skipped."""
        metrics = {name: float(value) for name, value in jax.device_get(dict(on_device)).items()}
        if all(map(math.isfinite, metrics.values())):
            self._skipped_in_a_row = 0
            return metrics
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self._config.max_skipped_steps:
            self._stop(step, metrics)
        self.say(
            f"step {step} is skipped: its loss is {metrics['loss']} and its gradient norm {metrics['grad_norm']}"
            f" ({self._skipped_in_a_row} of at most {self._config.max_skipped_steps} in a row)"
        )
        return metrics

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Write an evaluation, and count throughput from here."""
        self._write(step, {f"eval/{name}": value for name, value in results.items()})
        shown = {f"eval {name}": results[name] for name in ("loss", "perplexity", "accuracy")}
        self.say(f"step {step} " + " ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        self._tokens, self._since = 0, time.monotonic()

    def samples(self, step: int, samples: Iterable[tuple[str, str]]) -> None:
        """Write and say what the model adds to its prompts."""
        for prompt, text in samples:
            self.say(f"step {step} sample {prompt!r}: {text!r}")
            if self._writer:
                self._writer.write_sample(step, prompt, text)
        self._tokens, self._since = 0, time.monotonic()

    def times(self, step: int) -> None:
        """Write where the wall time went until the checkpoint of a step, with the last one as part of its rows too."""
        if self._times:
            self._times.write(step)
        if step == self._config.steps:
            self._write(step, self._timer.split())

    def say(self, message: str) -> None:
        """Print a line."""
        if self._progress:
            self._progress.say(message)

    def _write_step(self, step: int, metrics: Mapping[str, float], tokens: int) -> None:
        now = time.monotonic()
        seq_len = tokens // self._config.batch_size
        if seq_len not in self._facts:
            self._facts[seq_len] = Facts.of(self._config, seq_len)
        throughput = self._facts[seq_len].row(self._tokens / max(now - self._since, 1e-9))
        self._tokens, self._since = 0, now
        taken = step - 1 - int(metrics.get("skipped_steps", 0)) + self.skipping
        self._write(step, {**metrics, "lr": float(self._lr(taken)), **throughput})
        if self._progress:
            shown = {name: metrics[name] for name in ("loss", "accuracy")}
            self._progress.update(step, shown | {"tokens/s": round(throughput["tokens_per_second"])})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._writer:
            self._writer.write(step, values)

    def _stop(self, step: int, metrics: Mapping[str, float]) -> None:
        with contextlib.suppress(UnwritableError):
            self._write(step, metrics)
        last = self._checkpoints.latest()
        good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last}"
        raise DivergedError(
            f"The loss of step {step} is {metrics['loss']} and its gradient norm {metrics['grad_norm']}: the run stops,"
            f" nothing of it was saved, and {good}."
        )
