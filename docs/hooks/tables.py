"""The guide's tables, each made from committed rows when the guide is built; `TABLES` names them.

Where an experiment has a table of its own for its README, it is that one.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from based_jax.bench.rows import read
from based_jax.nn.describe import describe
from based_jax.optim.config import OptimConfig
from based_jax.optim.groups import NO_DECAY, PARAMETER_GROUPS
from based_jax.pictures.configurations import configurations
from based_jax.pictures.tables import markdown
from docs.hooks import losses
from experiments.cache_policies import __main__ as cache_policies
from experiments.dna import __main__ as dna
from experiments.generation import results as generation_rows
from experiments.generation import tables as generation
from experiments.kernels import results as kernel_rows
from experiments.kernels import tables as kernels
from experiments.mqar_pareto import rows as recall_rows
from experiments.mqar_pareto import tables as recall
from experiments.pods import __main__ as pods
from experiments.tpu import __main__ as tpu
from experiments.train_speed import __main__ as train_speed
from experiments.train_speed import mesh

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
DESCRIBED_WIDTH, DESCRIBED_LENGTH = 1024, 2048
MIB = 1 << 20
Column = str | Callable[[Mapping[str, Any]], Any]
"""Of a table: the key of a row, or what makes the cell of it."""


def told(path: str, columns: Mapping[str, Column]) -> str:
    """Return a table of an experiment's rows, a column for each of these, and what made them."""
    rows = read(EXPERIMENTS / path)
    cells = [{head: str(of(row) if callable(of) else row.get(of, "-")) for head, of in columns.items()} for row in rows]
    return made_by(markdown(pd.DataFrame(cells, columns=list(columns))), rows)


def made_by(table: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table with the devices and the versions of JAX that made its rows, below."""
    found = list(rows)
    devices = dict.fromkeys(str(row["device"]) for row in found if "device" in row)
    versions = dict.fromkeys(row["versions"]["jax"] if "versions" in row else row["jax"] for row in found)
    return f"{table}\n\n{' and '.join(devices)}; jax {', '.join(versions)}."


def inventory() -> str:
    """Return every file of rows, with what was measured on what."""
    lines = []
    for folder in sorted(EXPERIMENTS.glob("*/results")):
        for path in sorted(folder.rglob("*.jsonl")):
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            devices = dict.fromkeys(str(row["device"]) for row in rows if "device" in row)
            name = path.relative_to(EXPERIMENTS).as_posix()
            lines.append([f"`{name}`", f"{len(rows):,}", ", ".join(devices) or "-"])
    return markdown(pd.DataFrame(lines, columns=["experiments/", "rows", "devices"]))


def mixers() -> str:
    """Return what a layer of each mixer is at a width: counted, not measured."""
    rows = [row for row in describe(DESCRIBED_WIDTH, DESCRIBED_LENGTH) if row.params is not None]
    cells = [[f"`{x.mixer}`", f"{x.params:,}", f"{x.state_kib:,}", f"{x.train_mflops_per_token:,}"] for x in rows]
    head = ["mixer", "parameters", "state of a sequence, KiB", "MFLOPs of a token in training"]
    return markdown(pd.DataFrame(cells, columns=head))


def parameter_groups() -> str:
    """Return what each name of a parameter is to the optimizer, and which decay by default: as the code has it."""
    exempt = NO_DECAY[OptimConfig().decay]
    lines = [
        [", ".join(f"`{name}`" for name in names), group, "no" if group in exempt else "yes"]
        for group, names in PARAMETER_GROUPS.items()
    ]
    return markdown(pd.DataFrame(lines, columns=["a parameter called", "is", "and decays"]))


def budgets() -> str:
    """Return what each family recalls within a budget of bytes."""
    return made_by(recall.budgets(recall_points()), (row for point in recall_points() for row in point.rows))


@functools.cache
def recall_points() -> list:
    """Return the configurations of the frontier, by bytes."""
    rows = recall_rows.of_recipe(recall_rows.RESULTS / "figure2", "reference")
    return sorted(configurations(rows), key=lambda point: point.state_bytes(convolution=False))


def policies() -> str:
    """Return what attention recalls by the policy of its cache and the tokens that it keeps, the mean over seeds."""
    rows = pd.DataFrame(read(cache_policies.RESULTS / "policies.jsonl")).dropna(subset="budget")
    table = rows.pivot_table("accuracy", "policy", "budget", aggfunc="mean", sort=False).sort_index(axis=1)
    table.columns = [f"{int(tokens)} tokens" for tokens in table.columns]
    told_table = markdown(table.map("{:.3f}".format).rename_axis("policy").reset_index())
    return made_by(told_table, read(cache_policies.RESULTS / "policies.jsonl"))


def scaling() -> str:
    """Return time and memory of each mixer against the length."""
    rows = read(EXPERIMENTS / "scaling" / "results" / "scaling.jsonl")
    found = pd.DataFrame(rows).drop_duplicates(["mixer", "length"], keep="last")
    table = found.pivot(index="mixer", columns="length", values=["ms", "memory_mib"])
    heads = {"ms": "ms at {:,}", "memory_mib": "MiB at {:,}"}
    cells = pd.DataFrame({heads[name].format(length): table[name, length] for name, length in table})
    cells = cells.map(lambda x: f"{x:,.2f}" if x < 100 else f"{x:,.0f}")
    cells.insert(0, "mixer", [f"`{name}`" for name in table.index])
    return made_by(markdown(cells), rows)


def _bits(file: str) -> str:
    rows = [row for path in sorted(dna.RUNS.glob("*.jsonl")) for row in read(path)]
    return made_by(dna.bits_table(file), rows)


@functools.cache
def _training() -> list[dict]:
    return read(train_speed.ROWS)


@functools.cache
def _decoding() -> dict[str, str]:
    rows = read(generation_rows.ROWS)
    found = generation.tables(generation_rows.Found.of(rows))
    return {name: made_by(table, rows) for name, table in found.items()}


TABLES: dict[str, Callable[[], str]] = {
    "inventory": inventory,
    "mixers": mixers,
    "parameter_groups": parameter_groups,
    "budgets": budgets,
    "asked": lambda: recall.agreement(recall_points()),
    "policies": policies,
    "training": lambda: train_speed.models_table(_training()),
    "training_times": lambda: train_speed.times_table(_training()),
    "training_mesh": lambda: mesh.tables()["mesh"],
    "training_peers": lambda: train_speed.peers_table(_training()),
    "decoding_batches": lambda: _decoding()["batches"],
    "decoding_contexts": lambda: _decoding()["contexts"],
    "decoding_prompts": lambda: _decoding()["prompts"],
    **{f"kernels_{name}": functools.partial(table, kernel_rows.FOLDER) for name, table in kernels.TABLES.items()},
    "scaling": scaling,
    "sequence_memory": lambda: told(
        "sequence/results/memory.jsonl",
        {
            "devices": "devices",
            "tokens of the row": lambda row: f"{row['tokens']:,}",
            "GiB of temporaries a device": "temporaries_gib",
            "MiB sent beside the gradients' sums": "sent_mib",
        },
    ),
    "pods": pods.table,
    "pods_kernels": pods.kernel_table,
    "tpu": tpu.table,
    "tpu_left": tpu.left_table,
    "packing": lambda: told(
        "data/results/billion.jsonl",
        {
            "files": lambda row: f"`.{row['kind']}`",
            "tokens": lambda row: f"{row['tokens']:,}",
            "packed, tokens/s": lambda row: f"{row['pack_tokens_per_second']:,}",
            "memory, MiB": lambda row: f"{row['pack_peak_bytes'] / MIB:,.0f}",
            "read, tokens/s": lambda row: f"{row['read_tokens_per_second']:,}",
        },
    ),
    "prefix_cache": lambda: told(
        "prefix_cache/results/rows.jsonl",
        {
            "model": lambda row: f"`{Path(row['config']).name}`" + (f", D {row['d_model']}" if row["d_model"] else ""),
            "device": "device",
            "a prompt": "prompt",
            "its tokens": lambda row: f"{row['prompt_tokens']:,}",
            "tokens restored": lambda row: f"{row['restored']:,}",
            "ms to the first token": lambda row: f"{1e3 * row['seconds']:,.0f}",
        },
    ),
    "moments": lambda: told(
        "optimizers/results/moments.jsonl",
        {
            "decay": "decay",
            "moments": "moments",
            "rounding": "rounding",
            "mean over fp32's": "mean_over_fp32",
            "rms error": "rms_error",
        },
    ),
    "optimizers": lambda: told(
        "optimizers/results/runs.jsonl",
        {
            "optimizer": "optimizer",
            "learning rate": "lr",
            "decay": "decay",
            "moments": "moments",
            "rounding": "rounding",
            "loss, nats a byte": "loss",
            "held out": "held_out",
        },
    ),
    "state_addition": lambda: told(
        "state_addition/results/rows.jsonl",
        {
            "task": "task",
            "reading": "reading",
            "pieces": "pieces",
            "overlap": "overlap",
            "loss": lambda row: f"{row['loss']:.3f}",
            "accuracy": lambda row: f"{row['accuracy']:.3f}",
        },
    ),
    **{f"dna_{file}": functools.partial(_bits, file) for file in dna.TITLES},
    "losing_kernels": losses.kernels,
    "losing_training": losses.training,
    "losing_decoding": losses.decoding,
    "losing_recall": lambda: losses.recall(recall_points()),
    "losing_dna": losses.dna,
    "losing_checks": losses.checks,
}
