"""Sweep files and stores."""

import functools
import os

from based_jax.store import Store
from based_jax.sweep import Sweep, product
from tests.bad_inputs.cases import Call, Command

SEGMENT = {"num_examples": 40, "seq_len": 16, "num_kv_pairs": 2}
BASE = {
    "model": {"layers": (("base_conv", {}),), "d_model": 8, "vocab_size": 40, "mlp": "none", "dtype": "float32"},
    "data": {"kind": "mqar", "preset": "tiny", "vocab_size": 40, "train": (SEGMENT,), "test": (SEGMENT,)},
    "batch_size": 20,
}
POINTS = (
    "from based_jax.sweep import Sweep, chain, param, product, zipped\nBASE = {base!r}\ndef get_sweep():\n    return "
)


def sweep(text, base=BASE):
    """Return what writes a sweep file whose `get_sweep` returns this."""
    return functools.partial(written, "sweep.py", POINTS.format(base=base) + text + "\n")


def written(name, text, folder):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def run(name, sentence, *words, prepare, store="<new>"):
    """Return the case of `sweep run` of a file."""
    return Command(name, ("sweep", "run", "<tmp>/sweep.py", f"--store={store}", *words), sentence, prepare)


def points(name, text, sentence, base=BASE):
    """Return the case of a sweep of these points."""
    return run(name, sentence, prepare=sweep(f"Sweep(BASE, {text})", base))


def option(*words, sentence):
    """Return the case of `sweep run` with further words, named by them."""
    return run(" ".join(("sweep run", *words)), sentence, *words, prepare=sweep("Sweep(BASE, [{}])"))


def store(name, sentence, prepare, action="run"):
    """Return the case of a store that a command cannot use: '<tmp>/store'."""

    def prepared(folder):
        sweep("Sweep(BASE, [{}])")(folder)
        prepare(folder)

    words = {"plot": ("plot", "--out=<new>"), "list": ("list", "<tmp>/sweep.py"), "run": ("run", "<tmp>/sweep.py")}
    return Command(name, ("sweep", *words[action], "--store=<tmp>/store"), sentence, prepared)


def rows(text):
    """Return what writes a store of one file of rows."""

    def write(folder):
        (folder / "store").mkdir()
        written("store/a.jsonl", text, folder)

    return write


def dangling(folder):
    (folder / "store").symlink_to(folder / "none" / "x")


def pipe(folder):
    (folder / "store").mkdir()
    os.mkfifo(folder / "store" / "a.jsonl")


def at(path, sentence):
    """Return the case of a store at this path, whose name is the sentence."""
    return run(f"sweep run --store={path}", sentence, prepare=sweep("Sweep(BASE, [{}])"), store=path)


def full_disk(folder):
    """Look at a store on a full disk."""
    fsync, os.fsync = os.fsync, _no_space
    try:
        Store(folder).check_writable()
    finally:
        os.fsync = fsync


def _no_space(file):
    raise OSError(28, os.strerror(28))


RUNS = BASE | {"steps": 2, "optim": {"warmup_steps": 1}}

CASES: tuple[Command | Call, ...] = (
    points("a sweep without points", "[]", "The sweep has no points; give at least one"),
    points(
        "an unknown key in a point", "param('optim.lrr', [1])", "1 of 1 points cannot be trained, first {'optim.lrr'"
    ),
    points(
        "some points are impossible",
        "param('optim.lr', [1e-3, -1.0, -2.0])",
        "2 of 3 points cannot be trained, first {'optim.lr': -1.0}: optim.lr is -1.0; it is at least 0",
    ),
    points(
        "heads that do not divide the width",
        "product(param('seed', [0, 1]), param('model.layers', [(('attention', {'num_heads': n}),) for n in (1, 3)]))",
        "2 of 4 points cannot be trained, first {'seed': 0, 'model.layers': (('attention', {'num_heads': 3}),)}: ",
    ),
    points(
        "a filter shorter than the rows",
        "[{}, {'model.layers': (('hyena', {'l_max': 8}),)}]",
        "1 of 2 points cannot be trained, first {'model.layers': (('hyena', {'l_max': 8}),)}: ",
    ),
    points(
        "a warmup longer than the trial", "[{'optim.warmup_steps': 9}]", "warmup_steps is 9, but the run has 2 steps"
    ),
    points("a vocabulary below the data's", "[{}, {'model.vocab_size': 30}]", "model.vocab_size is 30, but the data"),
    points("a mesh larger than the devices", "[{'mesh': {'data': 64}}]", "needs 64 devices; there are 1.", base=RUNS),
    points(
        "microbatches that do not divide", "[{'microbatches': 3}]", "cannot be divided into 3 microbatches", base=RUNS
    ),
    points("rows of a device", "[{'rows_per_device': 2}]", "rows_per_device is 2; points of a sweep have", base=RUNS),
    points("a point that is no dict", "[[('seed', 1)]]", "A point of a sweep is [('seed', 1)]; it is a dict"),
    points("a key that is no string", "[{1: 2}]", "A point of a sweep is {1: 2}; it is a dict from config keys"),
    points("a value that is no value", "[{'seed': print}]", "which JSON cannot hold"),
    points("points that are no list", "3", "The points of a sweep are 3; they are a list of dicts."),
    points(
        "points that are one dict", "{'seed': 1}", "The points of a sweep are {'seed': 1}; they are a list of dicts."
    ),
    points("a key given twice", "product(param('seed', [0]), param('seed', [1]))", "'seed' is set by two"),
    points(
        "a key lost in its section",
        "product(param('optim.lr', [1.0]), param('optim', [{}]))",
        "Config key 'optim.lr' of a point is overwritten by its 'optim'; set it in one of them.",
    ),
    points("spaces of two lengths", "zipped(param('seed', [0]), param('optim.lr', [1.0, 2.0]))", "not of 1, 2"),
    points("a key without values", "param('seed', [])", "param 'seed' has no values"),
    points("a base that is no mapping", "[{}]", "The base of a sweep is 3; it is a mapping", base=3),
    points("a base whose data is no section", "[{}]", "it is a section of keys.", base=BASE | {"data": 3}),
    run("get_sweep returns its points", "is [{'seed': 1}]; get_sweep returns a Sweep.", prepare=sweep("[{'seed': 1}]")),
    run("no get_sweep", "has no function get_sweep", prepare=functools.partial(written, "sweep.py", "x = 3\n")),
    run("an error in a sweep file", "ZeroDivisionError", prepare=sweep("1 / 0")),
    run("a syntax error in a sweep file", "SyntaxError", prepare=sweep("Sweep(BASE, [{}")),
    run(
        "sys.exit in a sweep file",
        "SystemExit",
        prepare=functools.partial(written, "sweep.py", "import sys\nsys.exit(3)\n"),
    ),
    run("the line of an error in a sweep file", "at <tmp>/sweep.py:4.", prepare=sweep("1 / 0")),
    option("--lanes=0", sentence="--lanes is 0; it is at least 1."),
    option("--workers=0", sentence="--workers is 0; it is at least 1."),
    option("--workers=-1", sentence="--workers is -1; it is at least 1."),
    option("--processes=0", sentence="--processes is 0; it is at least 1."),
    option("--launcher=ray", "--tasks=0", sentence="--tasks is 0; it is at least 1."),
    option("--seconds=-1", sentence="--seconds is -1.0; it is at least 0."),
    option("--seconds=nan", sentence="--seconds is nan; it is at least 0."),
    option("--launcher=ray", "--seconds=9", sentence="--seconds is for --launcher=local, not for ray."),
    option("--lanes=few", sentence="invalid int value: 'few'"),
    option("--part=3/2", sentence="--part is '3/2'; it is i/n with 0 <= i < n, such as 0/4."),
    option("--part=", sentence="--part is ''"),
    option("--launcher=slrum", sentence="Unknown launcher 'slrum': did you mean 'slurm'?"),
    option("--launcher=slurm", "--part=1/2", sentence="--part is for --launcher=local, not for slurm."),
    option("--launcher=ray", "--processes=2", sentence="--processes is for --launcher=local, not for ray."),
    option("--tasks=4", sentence="--tasks is for --launcher=ray or slurm, not for local."),
    option("--script=job.sh", sentence="--script is for --launcher=slurm, not for local."),
    option(
        "--launcher=slurm",
        "--script=<tmp>/none/job.sh",
        sentence="'<tmp>/none/job.sh' cannot be written: No such",
    ),
    at("", "store is '', which names nothing"),
    at("gs://bucket/rows", "store is 'gs://bucket/rows', an address of 'gs'"),
    at("/proc/based_jax/rows", "Store '/proc/based_jax/rows' cannot be written: "),
    at("<tmp>/sweep.py", "Store '<tmp>/sweep.py' cannot be written: '<tmp>/sweep.py' is no folder."),
    at("<tmp>/sweep.py/rows", "cannot be written: '<tmp>/sweep.py' is no folder."),
    store("a store that is a link to nothing", "'<tmp>/store' is no folder", dangling),
    store("a store that is not UTF-8", r"Line 1 of '<tmp>/store/a.jsonl' is no row: '\\xff{'.", rows(b"\xff{\n")),
    store(
        "a line of a store that is no object", "Line 1 of '<tmp>/store/a.jsonl' is no row: '[1]'", rows("[1]\n"), "list"
    ),
    store("a row without a name", "is no row: '{\"id\": [1]}'", rows('{"id": [1]}\n{"id": "a"}\n'), "plot"),
    store("a store of a pipe", "cannot be read: It is a pipe or a device", pipe, "plot"),
    store("a picture of no store", "Store '<tmp>/store' does not exist", lambda folder: None, "plot"),
    Command(
        "an empty store's name in a list",
        ("sweep", "list", "<tmp>/sweep.py", "--store="),
        "store is '', which names nothing",
        sweep("Sweep(BASE, [{}])"),
    ),
    Call("a full disk", full_disk, "cannot be written: No space left on device."),
    Call("a store at an address", lambda _: Store("s3://bucket"), "store is 's3://bucket', an address of 's3'"),
    Call("a sweep whose points are a name", lambda _: Sweep(BASE, "seed"), "The points of a sweep are 'seed'"),
    Call("trials of nothing", lambda _: Sweep(BASE, []).trials(), "The sweep has no points"),
    Call("a space times a key", lambda _: product([{"seed": 1}], [{"seed": 2}]), "'seed' is set by two"),
)
