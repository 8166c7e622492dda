"""The rows of generation: the last one of each model, batch and context, and what they are to reach."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROWS = Path(__file__).parent / "results" / "generation.jsonl"
BATCHES, CONTEXTS = (1, 8, 32, 128, 512), (512, 2048, 4096, 16384, 65536)
ONE_BATCH, ONE_CONTEXT = 128, 2048
"""Of the tables by context and by batch."""


FLUSH = 16
"""Tokens that Taylor attention's state takes at once, where it does not take each by itself."""
GOAL_DRAFTS = 3
"""Tokens that are drafted where four are verified at once."""
CACHE_BUDGET = 512
"""Tokens that attention keeps with a policy."""
KV_TOKENS = 1 << 18
"""Of all sequences together, where each takes memory."""


class Model(NamedTuple):
    """A config of this package, or a peer, with options of mixers.

    Attributes:
      grows: whether its state does with the context.
      reads: whether prompts are timed; those that do not fit a budget are read token by token.
    """

    config: str
    options: tuple[str, ...] = ()
    grows: bool = False
    reads: bool = True

    def batch(self, context: int) -> int:
        """Return how many sequences are tried with a context."""
        return min(ONE_BATCH, KV_TOKENS // context) if self.grows else ONE_BATCH

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """All batches at one context, and all contexts."""
        others = [context for context in CONTEXTS if context != ONE_CONTEXT]
        return [(x, ONE_CONTEXT) for x in BATCHES] + [(self.batch(x), x) for x in others]


POLICIES = {
    f"attention_1b_{policy}": Model(
        "configs/attention.py:1b",
        (f"attention.cache_policy={policy}", f"attention.cache_budget={CACHE_BUDGET}"),
        reads=False,
    )
    for policy in ("window", "streaming", "h2o", "roco")
}
MODELS = {
    "based_1b": Model("configs/based.py:1b"),
    "based_1b_flush": Model("configs/based.py:1b", (f"taylor.flush={FLUSH}",)),
    "attention_1b": Model("configs/attention.py:1b", grows=True),
    "mamba_1b": Model("configs/mamba.py:1b"),
    "gated_deltanet_1b": Model("configs/gated_deltanet.py:1b"),
    **POLICIES,
    "based_360m": Model("configs/based.py:360m"),
    "based_360m_flush": Model("configs/based.py:360m", (f"taylor.flush={FLUSH}",)),
    "attention_360m": Model("configs/attention.py:360m", grows=True),
    "mamba_360m": Model("configs/mamba.py:360m"),
    "gated_deltanet_360m": Model("configs/gated_deltanet.py:360m"),
}
PEERS = {
    "hf:llama_1b": Model("hf:llama_1b", grows=True),
    "fla:gated_deltanet_1b": Model("fla:gated_deltanet_1b"),
    "hf:llama_360m": Model("hf:llama_360m", grows=True),
    "fla:gated_deltanet_360m": Model("fla:gated_deltanet_360m"),
}

Key = tuple[str, int, int]


class Found(NamedTuple):
    """The rows by name of the model, batch and context; those of what did not fit have an "error".

    Attributes:
      rows: of tokens that are decoded one by one.
      drafted: of those that are verified several at a time, by the number of drafted ones as well.
      read: of prompts, by name and length.
      profiled: of tokens that are decoded one by one, where the time of one is told.
    """

    rows: Mapping[Key, dict]
    drafted: Mapping[tuple[str, int, int, int], dict] = {}
    read: Mapping[tuple[str, int], dict] = {}
    profiled: Mapping[Key, dict] = {}

    @classmethod
    def of(cls, rows: Iterable[dict]) -> "Found":
        """Return the last row of each."""
        names = {(model.config, tuple(sorted(model.options))): name for name, model in (MODELS | PEERS).items()}
        plain = [row for row in rows if not row.get("overrides")]
        named = [(names.get((row["config"], tuple(row.get("options", ())))), row) for row in plain]
        keyed = [((name, row["batch"], row["context"]), row) for name, row in named if name is not None]
        return cls(
            {key: row for key, row in keyed if not row.get("drafts")},
            {(*key, row["drafts"]): row for key, row in keyed if row.get("drafts") and "error" not in row},
            {key[::2]: row for key, row in keyed if "prefill_rows" in row},
            {key: row for key, row in keyed if row.get("breakdown") and not row.get("drafts")},
        )

    def row(self, name: str, batch: int, context: int) -> dict | None:
        """Return the row of a size that was measured, or None."""
        row = self.rows.get((name, batch, context))
        return None if row is None or "error" in row else row

    def fullest(self, name: str, context: int, most: int = ONE_BATCH) -> dict | None:
        """Return the row of the most sequences, up to a number, that fit at a context; None where fewer were tried."""
        tried = sorted((key[1] for key in self.rows if key[::2] == (name, context) and key[1] <= most), reverse=True)
        if not tried or tried[0] < min(most, (MODELS | PEERS)[name].batch(context)):
            return None
        found = (self.row(name, batch, context) for batch in tried)
        return next((row for row in found if row is not None), None)

    def times_if_right(self, name: str, batch: int, context: int, drafts: int) -> float | None:
        """Return how many times as fast tokens are verified with so many drafted as decoded one by one, if known."""
        drafted, one = self.drafted.get((name, batch, context, drafts)), self.row(name, batch, context)
        return drafted["verified_tokens_per_second"] / one["tokens_per_second"] if drafted and one else None

    def is_too_large(self, name: str, batch: int, context: int) -> bool:
        """Return whether a size was tried and did not fit."""
        return "error" in self.rows.get((name, batch, context), {})

    def devices(self) -> list[str]:
        """Return the devices of all rows."""
        return list(dict.fromkeys(row["device"] for row in self.rows.values()))


def share(row: dict) -> float | None:
    """Return the tokens/s of a row over those of its roofline."""
    roofline = row["roofline_tokens_per_second"]
    return row["tokens_per_second"] / roofline if roofline else None


class Goal(NamedTuple):
    """What is to be reached; `found` is what the rows say of it, in the same unit, or None."""

    what: str
    least: float
    unit: str
    found: float | None


BASED = "based_1b", "based_1b_flush"
"""Models that compute the same."""


def goals(found: Found) -> list[Goal]:
    """Return the goals of one H200 for models of 1.3B parameters with weights in bf16; of `BASED` the faster counts."""
    one_by_one, late = (_speed(found, [name]) for name in BASED)
    roofline, tokens, times = "of its roofline", "tokens/s", "times"
    return [
        Goal("Based, batch 128, 2K of context", 55_000, tokens, _speed(found, BASED)),
        Goal("Based, batch 128, 64K of context", 55_000, tokens, _speed(found, BASED, context=65536)),
        Goal("Based, batch 512", 90_000, tokens, _speed(found, BASED, 512)),
        Goal("Based, batch 1", 800, tokens, _speed(found, BASED, 1)),
        Goal("Based, its state written every 16 tokens, over each, batch 128", 1.3, times, _ratio(late, one_by_one)),
        Goal("Based verifies 4 tokens, over one by one, batch 128", 1.9, times, _verified(found)),
        Goal("attention, batch 128, 2K of context", 0.6, roofline, _share(found, "attention_1b")),
        Goal("Based over attention, batch 128, 2K of context", 5, times, _over_attention(found, 2048)),
        Goal("Based over attention at what fits, 16K of context", 20, times, _over_attention(found, 16384)),
        Goal("Based reads prompts of 4K", 350_000, tokens, _prompts(found, 4096)),
        Goal("Mamba, batch 128", 0.6, roofline, _share(found, "mamba_1b")),
        Goal("Gated DeltaNet, batch 128", 0.6, roofline, _share(found, "gated_deltanet_1b")),
    ]


def _speed(found: Found, names: Iterable[str], batch: int = ONE_BATCH, context: int = ONE_CONTEXT) -> float | None:
    rows = (found.row(name, batch, context) for name in names)
    return max((row["tokens_per_second"] for row in rows if row), default=None)


def _verified(found: Found) -> float | None:
    """Return how many times as fast the newest token and `GOAL_DRAFTS` behind it are read together."""
    return found.times_if_right("based_1b_flush", ONE_BATCH, ONE_CONTEXT, GOAL_DRAFTS)


def _share(found: Found, name: str) -> float | None:
    row = found.row(name, ONE_BATCH, ONE_CONTEXT)
    return share(row) if row else None


def _ratio(speed: float | None, other: float | None) -> float | None:
    return speed / other if speed and other else None


def _over_attention(found: Found, context: int) -> float | None:
    attention = found.fullest("attention_1b", context)
    return _ratio(_speed(found, BASED, ONE_BATCH, context), attention and attention["tokens_per_second"])


def _prompts(found: Found, length: int) -> float | None:
    rows = (found.read.get((name, length)) for name in BASED)
    return max((row["prefill_tokens_per_second"] for row in rows if row), default=None)
