"""What a model is worth: perplexity, SQuAD's questions, and bytes of state."""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

from based_jax.data.packing import PackedText
from based_jax.data.text import open_corpus
from based_jax.data.tokenizer import TextTokenizer
from based_jax.evals import recall
from based_jax.evals.likelihood import Judge, row_of, strided
from based_jax.evals.recall_tasks import Part, Selection
from based_jax.evals.slices import documents
from based_jax.generate import Decoder
from based_jax.nn.lm import LM
from based_jax.store import Store

WINDOW = 2048
"""Tokens of a window of validation, and that a prompt has at most."""
CONTEXTS = 2048, 8192
TASK = "squad_questions"


def perplexity(
    model: LM, corpus: str, tokenizer: TextTokenizer, cache: Path, most: int | None = None
) -> dict[str, Any]:
    """Return perplexity on the corpus' validation, whose documents are read from their first token in windows.

    Args:
      model, tokenizer: what is measured.
      corpus: a folder of text.
      cache: where its tokens are kept.
      most: windows that are judged; None for all.
    """
    packed = PackedText.open(open_corpus(corpus), tokenizer, cache)
    texts = documents(packed.stream("validation"), tokenizer.end_of_text)
    windows = (window for tokens in texts for window in strided(tokens, WINDOW, WINDOW // 2))
    rows = [row_of(window) for window in itertools.islice(windows, most)]
    judged = list(Judge(model, min(8, len(rows)) * WINDOW).judged(rows))
    asked = [rows[place][1] >= 0 for place, _ in judged]
    loss = sum(float(x.losses.sum(dtype="float64")) for _, x in judged) / sum(int(x.sum()) for x in asked)
    return {"perplexity": round(math.exp(loss), 3), "judged_tokens": sum(int(x.sum()) for x in asked)}


def recalled(name: str, decoder: Decoder, tokenizer: TextTokenizer, folder: Path, limit: int | None) -> dict[str, Any]:
    """Return the F1 of SQuAD's questions and the share of answers that are said, as `eval recall` scores them."""
    asked, store = recall.Asked(name, decoder, tokenizer, 32, WINDOW), Store(folder)
    recall.run_part(asked, Part(TASK), Selection(tokenizer, {}, limit, 0), store, sys.stderr)
    rows = [row for row in recall.rows_of(store) if row["fingerprint"] == decoder.fingerprint]
    scores = {f"squad_{score}": round(sum(row[score] for row in rows) / len(rows), 4) for score in ("f1", "contains")}
    return scores | {"squad_examples": len(rows)}


def state_bytes(decoder: Decoder) -> dict[str, int]:
    """Return the bytes that one sequence's caches take at each context."""
    return {str(context): decoder.state_bytes(context) for context in CONTEXTS}
