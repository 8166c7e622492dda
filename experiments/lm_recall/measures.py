"""What the study measures of a run that has been trained: losses by slice, recall by part, speeds and bytes."""

import functools
import time
from pathlib import Path
from typing import Any

import jax

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
from based_jax.sweep.measures import trained_per_second
from based_jax.train.run import TrainConfig
from experiments.lm_recall import questions, sweeps
from experiments.lm_recall.questions import ROWS, warming

QUESTIONS = Path("runs/lm_recall/questions.jsonl.xz")
RARE = 10
"""The most times that training has a pair whose second token counts as recalled: the corpus has 12 million tokens."""
BLOCK, TIMED_STEPS = 64, 48
"""Steps of the compiled loop that the questions' answers are drawn with, and of them those that are timed."""
CURVE_STEPS = 20
"""Between the losses of a row."""


class StudyMeasures:
    """What is measured of a config's model; see `based_jax.sweep.measures.Measures`.

    Args:
      config: of the run.
      path: of what the trained model is asked.

    Raises:
      UserError: there are no questions.
    """

    def __init__(self, config: TrainConfig, path: Path = QUESTIONS):
        self._config = config
        self._questions, self._tokenizer = questions.read(path), named_tokenizer(config.data.tokenizer)
        self._slicing = slices.Slicing(config.data.seq_len, config.data.seq_len // 2, RARE)

    def facts(self) -> dict[str, Any]:
        """Return the model's name, its tokens, and its elements of state."""
        config, length = self._config, self._slicing.length
        elements = functools.partial(state_elements, config.model.layers, config.model.d_model, convolution=False)
        return {
            "model": sweeps.name_of(config.model.layers),
            "tokens": config.steps * config.batch_size * length,
            "rare": RARE,
            "elements_by_length": {str(n * length): elements(n * length) for n in (1, 2, 4, 8)},
        }

    def of(self, model: LM, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """Return losses by slice, recall by part, how fast was trained and text is written, and the curve."""
        decoder, found = Decoder.of(model), self.slices(model)
        asked = [x.scored(decoder, self._tokenizer) for x in self._questions]
        whole = {name: found["all"].get(name) for name in ("loss", "perplexity")}
        curve = [round(row["loss"], 4) for row in metrics if "loss" in row and row["step"] % CURVE_STEPS == 0]
        trained = {"trained_per_second": round(trained_per_second(metrics)), "curve": curve}
        return whole | {"slices": found, "recall": asked} | self.writing(decoder) | trained

    def warm(self, model: LM) -> None:
        """Compile all programs of a model's measures, and give what they say away."""
        decoder = Decoder.of(model)
        self.slices(model)
        for found in warming(self._questions):
            found.scored(decoder, self._tokenizer)
        self.writing(decoder)

    @functools.cached_property
    def _validation(self) -> tuple[list, Any]:
        """The validation split's documents, and the pairs in them that training hardly has."""
        data = self._config.data
        packed = PackedText.open(open_corpus(data.path), self._tokenizer, Path(data.cache_dir or default_cache_dir()))
        documents = list(slices.documents(packed.stream("validation"), self._tokenizer.end_of_text))
        return documents, slices.rare_pairs(documents, slices.blocks(packed.stream("train")), self._slicing)

    def slices(self, model: LM) -> dict[str, dict[str, float]]:
        """Return what is known of each slice of the validation split, by its name."""
        judge = Judge(model, 16 * self._slicing.length)
        found = slices.slice_losses(judge, *self._validation, self._slicing).set_index("slice")
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
