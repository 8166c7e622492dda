"""What generation is timed at, and rows of it: the same for models of this package and of another."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from based_jax import devices
from based_jax.bench import step_profile
from based_jax.errors import UserError
from based_jax.generate.drafts import Drafts

PREFILL_TOKENS = 1 << 16
"""That prompts have together."""
PREFILLS, UNTIMED_PREFILLS = 3, 1


class Size(NamedTuple):
    """Sequences that are decoded together, and the tokens that each of them has had."""

    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Return the size of a text such as 128x2048; UserError for another."""
        parts = text.split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
            raise UserError(f"'{text}' is no size: give sequences x tokens, such as 128x2048.")
        return cls(*map(int, parts))


class Effort(NamedTuple):
    """How much is timed.

    Attributes:
      tokens: of a block, which is a program; with drafts, steps of it.
      blocks: that a median is of.
      profiled: whether one is profiled.
      prefill: whether prompts are read.
      drafts: tokens that are looked up in the text and verified with each one that is decoded; 0 for none.
    """

    tokens: int
    blocks: int
    profiled: bool
    prefill: bool
    drafts: int = 0


def products(batches: Iterable[int], contexts: Iterable[int]) -> list[Size]:
    """Return each batch with each context."""
    return [Size(batch, context) for context in contexts for batch in batches]


def prompts(sizes: Iterable[Size]) -> dict[int, int]:
    """Return by length how many prompts are read together, whatever the batch: as many as the largest has, or fit."""
    ordered = sorted(sizes)
    return {context: max(1, min(batch, PREFILL_TOKENS // context)) for batch, context in ordered}


def check(sizes: Sequence[Size], effort: Effort) -> None:
    """Raise UserError for a number that is below 1, or drafts that are none."""
    if effort.drafts:
        Drafts.by_lookup(effort.drafts)
    numbers = [(name, x) for size in sizes for name, x in size._asdict().items()]
    for name, x in [*numbers, ("tokens", effort.tokens), ("blocks", effort.blocks)]:
        if x < 1:
            raise UserError(f"{name} is {x}; it is at least 1.")


def roofline(moved: float, batch: int, device_kind: str) -> float | None:
    """Return the tokens/s of a batch whose step moves so many bytes at the rate of a copy on a device, if known."""
    device = devices.find(device_kind)
    if device is None or device.copy_bytes_per_second is None:
        return None
    return batch * device.copy_bytes_per_second / moved


def lines(row: dict[str, Any]) -> list[str]:
    """Return a row in lines of print."""
    head = f"({row['batch']},{row['context']}) on {row['device']}"
    if "error" in row:
        return [f"{head}: {row['error']}"]
    found = [f"{row['milliseconds']:.3f} ms a token, {row['tokens_per_second']:.0f} tokens/s"]
    if row.get("drafts"):
        most = row["verified_tokens_per_second"]
        found = [f"{row['milliseconds']:.3f} ms for a token and {row['drafts']} drafted, {most:.0f} tokens/s if right"]
    if row["roofline_tokens_per_second"]:
        share = row["tokens_per_second"] / row["roofline_tokens_per_second"]
        found.append(f"{share:.0%} of the roofline's {row['roofline_tokens_per_second']:.0f}")
    if "prefill_tokens_per_second" in row:
        found.append(f"prompts {row['prefill_tokens_per_second']:.0f} tokens/s")
    found.append(f"{row['state_bytes'] / 2**20:.2f} MiB of state a sequence")
    if row["peak_bytes"]:
        found.append(f"{row['peak_bytes'] / 2**30:.1f} GiB at most")
    found.append(f"compiled in {row['compile_seconds']:.1f} s")
    told = [row[name] for name in ("breakdown", "prefill_breakdown") if row.get(name)]
    return [f"{head}: {'; '.join(found)}", *(line for breakdown in told for line in step_profile.lines(breakdown))]
