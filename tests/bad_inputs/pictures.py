"""Pictures of stores and of runs."""

import json

from helpers import synthetic_rows as synthetic

from based_jax.pictures import curves, figures, page
from tests.bad_inputs.cases import Call, Command

MQAR = {"data": {"kind": "mqar", "seq_len": 1024}}
TEXT = {"data": {"kind": "text", "seq_len": 1024}}
CONV_AND = [[synthetic.CONV, mixer] for mixer in (("window", {"window": 1024}), ("taylor", {"feature_dim": 16}))]


def store(*rows):
    """Return what writes rows into the store '<tmp>/store'."""

    def prepare(folder):
        (folder / "store").mkdir()
        (folder / "store" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return prepare


def metrics(text):
    """Return what writes metrics into the run '<tmp>/run'."""

    def prepare(folder):
        (folder / "run").mkdir()
        (folder / "run" / "metrics.jsonl").write_text(text)

    return prepare


def of_data(data):
    """Return a row of a run on that data."""
    row = synthetic.row([("mamba", {})], 64)
    return row | {"id": json.dumps(data), "config": row["config"] | data}


def of_model(**values):
    """Return a row of a run of another model."""
    row = of_data(MQAR)
    return row | {"config": row["config"] | {"model": row["config"]["model"] | values}}


def file_in_the_way(folder):
    store(of_data(MQAR))(folder)
    (folder / "file").write_text("")


SWEEP_PLOT = ("sweep", "plot", "--store=<tmp>/store", "--out=<tmp>/out")
MIXED = [of_data(MQAR), of_data(TEXT)]
ODD_FIELDS = {"accuracy": "x", "segments": [1], "overrides": 3, "params": 1e9, "status": [], "versions": "1"}
ABLATION = [synthetic.row(layers, 128) for layers in CONV_AND]

CASES: tuple[Command | Call, ...] = (
    Command("plot of no run", ("plot", "<new>", "--out=<tmp>/out"), "'<new>' is no run: it has no metrics.jsonl."),
    Command("plot of a run and of none", ("plot", "<mqar_run>", "<new>", "--out=<tmp>/out"), "'<new>' is no run"),
    Command(
        "plot without rows", ("plot", "<tmp>/run", "--out=<tmp>/out"), "Run '<tmp>/run' has no rows yet", metrics("")
    ),
    Command(
        "plot of half a row", ("plot", "<tmp>/run", "--out=<tmp>/out"), "has no rows yet", metrics('{"step": 1, "lo')
    ),
    Command(
        "plot of rows of something else",
        ("plot", "<tmp>/run", "--out=<tmp>/out"),
        "Line 2 of '<tmp>/run/metrics.jsonl' is no row of metrics",
        metrics('{"step": 1, "loss": 2}\n[1]\n{"step": 2, "loss": 1}\n'),
    ),
    Command(
        "plot of times alone",
        ("plot", "<tmp>/run", "--out=<tmp>/out"),
        "has rows, but none with loss",
        metrics('{"step": 1, "goodput": 1}\n'),
    ),
    Command("plot into nowhere", ("plot", "<mqar_run>", "--out="), "--out is '', which names nothing"),
    Command("plot into a bucket", ("plot", "<mqar_run>", "--out=gs://bucket/out"), "an address of 'gs'"),
    Command("plot into a file", ("plot", "<mqar_run>", "--out=<mqar.py>"), "'<mqar.py>' cannot be a folder"),
    Command("plot of nothing", ("plot", "--out=<tmp>/out"), "RUN"),
    Command("pictures of several tasks", SWEEP_PLOT, "different tasks, 'mqar' and 'text'", store(*MIXED)),
    Command(
        "an ablation of unequal sizes",
        (*SWEEP_PLOT, "--picture=ablation"),
        "An ablation compares a model of conv + window + Taylor with those of fewer of its parts",
        store(*ABLATION),
    ),
    Command(
        "an ablation of other models",
        (*SWEEP_PLOT, "--picture=ablation"),
        "No row is of conv, base_conv, window, taylor, linear alone",
        store(of_data(MQAR)),
    ),
    Command(
        "feature maps of other models",
        (*SWEEP_PLOT, "--picture=figure3"),
        "No row has a mixer 'linear' or 'taylor'",
        store(of_data(MQAR)),
    ),
    *(
        Command(f"a row whose {key} is {value!r}", SWEEP_PLOT, f"is not of a sweep: its {key} is {value!r}", store(row))
        for key, value in ODD_FIELDS.items()
        for row in [of_data(MQAR) | {key: value}]
    ),
    Command("a row of words", SWEEP_PLOT, "it needs", store(of_data(MQAR) | {"segments": {"64x4": "x"}})),
    Command("a row whose layers are none", SWEEP_PLOT, "is not of a sweep: it needs", store(of_model(layers=3))),
    Command("a row whose width is none", SWEEP_PLOT, "is not of a sweep: it needs", store(of_model(d_model="x"))),
    Command("no such picture", (*SWEEP_PLOT, "--picture=frontir"), "did you mean 'frontier'?", store(of_data(MQAR))),
    Command(
        "pictures into a file",
        ("sweep", "plot", "--store=<tmp>/store", "--out=<tmp>/file"),
        "'<tmp>/file' cannot be a folder: a file is in the way.",
        file_in_the_way,
    ),
    Call("a frontier of several tasks", lambda folder: figures.frontier(MIXED, folder / "x"), "different tasks"),
    Call("a page of several tasks", lambda folder: page.write(MIXED, folder / "x", title=""), "different tasks"),
    Call("an ablation of a long window", lambda folder: figures.ablation(ABLATION, folder / "x"), "(D 128, w 1024,"),
    Call("runs of an empty name", lambda folder: curves.read_runs([""]), "run is '', which names nothing"),
)
