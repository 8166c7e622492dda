"""A run of the study: trained from the config's first step to its last on one device, then judged and asked.

What can be done beside another run on the device is done before. While the model trains, a thread has its measures
taken of the weights before training, which compiles what is needed after it; speeds are timed when all that is done.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from based_jax import parallel
from based_jax.data.packing import PackedText, default_cache_dir
from based_jax.data.text import open_corpus
from based_jax.data.tokenizer_file import named_tokenizer
from based_jax.evals import slices
from based_jax.evals.likelihood import Judge
from based_jax.generate import Decoder, Request
from based_jax.generate.blocks import decode
from based_jax.generate.rows import begun
from based_jax.nn.accounting import state_elements
from based_jax.nn.lm import LM
from based_jax.sweep.points import Point
from based_jax.sweep.rows import run_row
from based_jax.train.compile import train_program
from based_jax.train.read_ahead import read_ahead
from based_jax.train.run import TrainConfig
from based_jax.train.step import TrainState
from experiments.lm_recall.questions import ROWS, Questions, warming

RARE = 10
"""The most times that training has a pair whose second token counts as recalled: the corpus has 12 million tokens."""
BLOCK, TIMED_STEPS = 64, 48
"""Steps of the compiled loop that the questions' answers are drawn with, and of them those that are timed."""
STEPS_AHEAD = 8
"""That the host may be in front of the device."""
TELLING_STEPS = 40
"""After which it is told whether a run can end in time."""
UNTIMED_STEPS, TIMED_TRAINING_STEPS = 5, 40
CURVE_STEPS = 20
"""Between the losses of a row."""


class NoTimeLeft(Exception):
    """A run that would not end in time."""


class Measures:
    """What is measured of a trained model; made of what does not depend on it."""

    def __init__(self, config: TrainConfig, questions: Sequence[Questions]):
        data = config.data
        self._questions, self._tokenizer = questions, named_tokenizer(data.tokenizer)
        packed = PackedText.open(open_corpus(data.path), self._tokenizer, Path(data.cache_dir or default_cache_dir()))
        self._slicing = slices.Slicing(data.seq_len, data.seq_len // 2, RARE)
        self._validation = list(slices.documents(packed.stream("validation"), self._tokenizer.end_of_text))
        training = slices.blocks(packed.stream("train"))
        self._rare = slices.rare_pairs(self._validation, training, self._slicing)

    def of(self, model: LM) -> dict[str, Any]:
        """Return losses by slice, recall by part, and how fast text is written."""
        decoder = Decoder.of(model)
        found = {"slices": self.slices(model), "recall": [x.scored(decoder, self._tokenizer) for x in self._questions]}
        return found | self.writing(decoder)

    def warm(self, model: LM) -> None:
        """Compile all programs of a model's measures, and give what they say away."""
        decoder = Decoder.of(model)
        self.slices(model)
        for found in warming(self._questions):
            found.scored(decoder, self._tokenizer)
        self.writing(decoder)

    def slices(self, model: LM) -> dict[str, dict[str, float]]:
        """Return what is known of each slice of the validation split, by its name."""
        judge = Judge(model, 16 * self._slicing.length)
        found = slices.slice_losses(judge, self._validation, self._rare, self._slicing).set_index("slice")
        return {str(name): row.dropna().to_dict() for name, row in found.iterrows()}

    def writing(self, decoder: Decoder) -> dict[str, Any]:
        """Return tokens/s of many rows together behind prompts of the training length, and the bytes of a state."""
        length = self._slicing.length
        prompt = max((ids for x in self._questions for ids in x.prompts), key=len)[: length - TIMED_STEPS - 1]
        rows = begun(decoder, [Request(prompt, TIMED_STEPS)] * ROWS, length)
        jax.block_until_ready(rows.token)
        begin = time.perf_counter()
        _, block = decode(decoder, rows, BLOCK, TIMED_STEPS)
        drawn = int(jax.device_get(block.drawn).sum())
        speed = {"written_per_second": round(drawn / (time.perf_counter() - begin)), "rows_written": ROWS}
        return speed | {f"stored_bytes_{n}x": decoder.state_bytes(n * length) for n in (1, 8)}


@dataclasses.dataclass(frozen=True)
class Trained:
    """The model after its last step, and the losses of every `CURVE_STEPS`-th step."""

    state: TrainState
    losses: list[float]


class Run:
    """A run that is ready: data, programs and first weights are there.

    Args:
      point, config: what is trained.
      questions: what the trained model is asked.
    """

    def __init__(self, point: Point, config: TrainConfig, questions: Sequence[Questions]):
        begin = time.perf_counter()
        self.point, self.config = point, config
        self._program = train_program(config, parallel.make_mesh(devices=jax.devices()[:1]))
        feed = parallel.Feed(self._program.mesh, config.batch_size)
        source = config.data.open(config.batch_size, feed.rows)
        self._read: Callable = lambda step: feed.arrays(source.batch(step))
        self._step = self._program.lower_step(source.batch(0)).compile()
        self._state = self._program.initial_state()
        self._thread = ThreadPoolExecutor(1)
        params = jax.tree.map(jnp.copy, self._state.params)  # a step takes the arrays that it is given
        self._warm = self._thread.submit(_warmed, config, questions, self._model(params))
        self.seconds_to_prepare = time.perf_counter() - begin

    def train(self, told: Callable[[str], None], until: float = math.inf) -> None:
        """Train to the last step; no other run is to use the device meanwhile.

        Raises:
          NoTimeLeft: after a few steps, if the last one would be behind `until` (of `time.time`).
        """
        begin = time.perf_counter()
        self._trained = self._all_steps(told, until)
        self._seconds = time.perf_counter() - begin
        told(f"trained in {self._seconds:.0f} s, the last loss {self._trained.losses[-1]:.3f}")

    def wait(self) -> None:
        """Wait until what measuring needs is compiled."""
        with self._thread:
            self._warm.result()

    def row(self) -> dict[str, Any]:
        """Measure the trained model alone on the device; return the row without what `sweep.rows.facts_of` adds."""
        begin = time.perf_counter()
        measured, losses = {}, self._trained.losses
        if finite := all(map(math.isfinite, losses)):
            measured = self._warm.result().of(self._model(self._trained.state.params))
        measured |= {"trained_per_second": round(self._timed(self._trained.state))}
        seconds = self._seconds + time.perf_counter() - begin
        row = run_row(self.point, self.config, measured["slices"]["all"] if finite else None, seconds)
        curve = [round(loss, 4) if math.isfinite(loss) else None for loss in losses]
        prepared = {
            "training_seconds": round(self._seconds, 2),
            "seconds_to_prepare": round(self.seconds_to_prepare, 1),
        }
        return row | self._facts() | measured | {"curve": curve} | prepared

    def _facts(self) -> dict[str, Any]:
        model, length = self.config.model, self.config.data.seq_len
        elements = functools.partial(state_elements, model.layers, model.d_model, convolution=False)
        return {
            "tokens": self.config.steps * self.config.batch_size * length,
            "rare": RARE,
            "elements_by_length": {str(n * length): elements(n * length) for n in (1, 2, 4, 8)},
        }

    def _all_steps(self, told: Callable[[str], None], until: float) -> Trained:
        config, state, begin = self.config, self._state, time.time()
        losses: list[jax.Array] = []
        with jax.set_mesh(self._program.mesh), read_ahead(self._read, range(config.steps)) as batches:
            for step, batch in enumerate(batches, 1):
                state, metrics = self._step(state, batch)
                losses.append(metrics["loss"])
                if step > STEPS_AHEAD:
                    losses[step - 1 - STEPS_AHEAD].block_until_ready()
                if step == TELLING_STEPS:
                    seconds = (config.steps - step) * (time.time() - begin) / step
                    if time.time() + seconds > until:
                        raise NoTimeLeft(f"it needs {seconds:.0f} s more")
                if step % (10 * CURVE_STEPS) == 0:
                    told(f"step {step}, loss {float(losses[step - 1 - STEPS_AHEAD]):.3f}")
        del self._state  # its arrays have been donated
        return Trained(state, [float(x) for x in losses[CURVE_STEPS - 1 :: CURVE_STEPS]] or [float(losses[-1])])

    def _timed(self, state: TrainState) -> float:
        """Return the tokens/s of more steps over one batch, the state given being used up."""
        batch, begin = self._read(0), 0.0
        with jax.set_mesh(self._program.mesh):
            for step in range(UNTIMED_STEPS + TIMED_TRAINING_STEPS):
                if step == UNTIMED_STEPS:
                    jax.block_until_ready(state)
                    begin = time.perf_counter()
                state, _ = self._step(state, batch)
        jax.block_until_ready(state)
        return TIMED_TRAINING_STEPS * batch["inputs"].size / (time.perf_counter() - begin)

    def _model(self, params: nnx.State) -> LM:
        return nnx.merge(self._program.graphdef, params)


def _warmed(config: TrainConfig, questions: Sequence[Questions], model: LM) -> Measures:
    measures = Measures(config, questions)
    measures.warm(model)
    return measures
