"""Workdirs, stores and the commands that read them."""

import os

from based_jax.config import CONFIG_FILE as CONFIG
from based_jax.train.run import load_config, load_run
from based_jax.train.workdir import checked_workdir
from tests.bad_inputs.cases import Call, Command


def file(name, text):
    """Return what writes a file into a folder."""
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def subfolder(name):
    """Return what makes a folder in a folder."""
    return lambda folder: (folder / name).mkdir()


def train(workdir, *overrides, config="mqar.py"):
    """Return the words of a training."""
    return ("train", f"--config=<{config}>", f"--workdir={workdir}", *overrides)


def config_json(name, text, sentence):
    """Return the case of a config.json that holds this."""
    return Command(name, ("eval", "--workdir=<tmp>"), sentence, file("config.json", text))


def in_the_way(name, prepare, workdir="<tmp>", sentence=""):
    """Return the case of a training where something else stands in the workdir."""
    return Command(name, train(workdir), sentence, prepare)


def pipe(name):
    """Return what makes a pipe in a folder, into which nobody writes."""
    return lambda folder: os.mkfifo(folder / name)


PIPE = "It is a pipe or a device, not a file."
BUCKET = "workdir is 'gs://bucket/run', an address of 'gs'; it is on this machine"
OTHER_CONFIG = "Workdir '<mqar_run>' belongs to another config: "

CASES: tuple[Command | Call, ...] = (
    Command("eval of no run", ("eval", "--workdir=<new>"), "'<new>' is no run: it has no config.json."),
    Command("generate of no run", ("generate", "--workdir=<new>", "--prompt=a"), "'<new>' is no run"),
    Command("serve of no run", ("serve", "--workdir=<new>", "--port=0"), "'<new>' is no run"),
    Command("serve of MQAR", ("serve", "--workdir=<mqar_run>", "--port=0"), "serve needs a run on 'text'"),
    Command("no slots", ("serve", "--workdir=<text_run>", "--slots=0"), "slots is 0; it is at least 1."),
    Command(
        "a port beyond", ("serve", "--workdir=<text_run>", "--port=99999"), "port is 99999; it is 1 to 65535, or 0"
    ),
    Command("no such host", ("serve", "--workdir=<text_run>", "--host=no host"), "listen at port 8000 of 'no host'"),
    Command(
        "a server's rows over fsdp",
        ("serve", "--workdir=<text_run>", "--mesh=fsdp:2", "--port=0"),
        "decodes over 'data'",
    ),
    Command("an empty key", ("serve", "--workdir=<text_run>", "--api-key="), "The API key is empty or has more than"),
    Command("no grace", ("serve", "--workdir=<text_run>", "--grace=0"), "it is 0, which is no time to wait"),
    Command("eval of a file", ("eval", "--workdir=<mqar.py>"), "'<mqar.py>' is no run: it has no config.json."),
    Command("export of no run", ("export", "<new>", "--hf=<tmp>/hf"), "'<new>' is no run"),
    Command("eval of no such step", ("eval", "--workdir=<mqar_run>", "--step=7"), "has no checkpoint of step 7"),
    config_json("half a config.json", '{"model": ', "config.json' is no config"),
    config_json("a list as config.json", "[1]", "config.json' is no config (it is [1]);"),
    config_json("pairs as config.json", '[["steps", 1]]', "config.json' is no config (it is [['steps', 1]]);"),
    config_json("a number as config.json", "3", "config.json' is no config (it is 3);"),
    config_json("config.json in UTF-16", "{}".encode("utf-16"), "config.json' is no config ('utf-8' codec"),
    config_json("a deep config.json", "[" * 100_000, "config.json' is no config (maximum recursion depth"),
    config_json("an empty config", "{}", "does not fit this version of based_jax: Config key 'model' is missing"),
    Command(
        "a folder as config.json",
        ("eval", "--workdir=<tmp>"),
        "config.json' cannot be read: Is",
        subfolder("config.json"),
    ),
    Command(
        "eval with an override",
        ("eval", "--workdir=<mqar_run>", "--config.steps=3"),
        "Unknown argument '--config.steps=3' for 'eval'",
    ),
    Command("generate of MQAR", ("generate", "--workdir=<mqar_run>", "--prompt=a"), "generate needs a run on 'text'"),
    Command(
        "a window longer than the text",
        train("<new>", "--config.data.seq_len=5000", config="text.py"),
        "seq_len 5000 is longer than the data",
    ),
    # where a run writes
    Command("train into nothing", train(""), "workdir is '', which names nothing ('.' is the current folder)."),
    Command("train into a bucket", train("gs://bucket/run"), BUCKET),
    Command("eval of nothing", ("eval", "--workdir="), "workdir is '', which names nothing"),
    Command("eval of a bucket", ("eval", "--workdir=gs://bucket/run"), BUCKET),
    Command("generate from a bucket", ("generate", "--workdir=gs://bucket/run", "--prompt=a"), BUCKET),
    Command("export from a bucket", ("export", "gs://bucket/run", "--hf=<new>"), BUCKET),
    Command("a file as workdir", train("<mqar.py>"), "'<mqar.py>' cannot be a workdir: '<mqar.py>' is no folder."),
    Command("a workdir in a file", train("<mqar.py>/run"), "cannot be a workdir: '<mqar.py>' is no folder."),
    Command("a workdir in /proc", train("/proc/run"), "'/proc/run' cannot be written: "),
    Command("a name that is too long", train("<tmp>/" + "a" * 300), "a part is longer than 255 bytes."),
    Command(
        "a store's name that is too long", ("sweep", "plot", "--store=" + "a" * 300, "--out=<new>"), "than 255 bytes."
    ),
    in_the_way("a file as checkpoints", file("checkpoints", ""), sentence="'<tmp>/checkpoints' is a file, where a run"),
    in_the_way("a folder as metrics", subfolder("metrics.jsonl"), sentence="'<tmp>/metrics.jsonl' is no file, where"),
    in_the_way("a pipe as metrics", pipe("metrics.jsonl"), sentence="'<tmp>/metrics.jsonl' is no file, where"),
    in_the_way("a pipe as data.json", pipe("data.json"), sentence="data.json' is damaged (It is a pipe or a device"),
    Command("a pipe as config.json", ("eval", "--workdir=<tmp>"), "config.json' cannot be read: " + PIPE, pipe(CONFIG)),
    Command("a pipe as config file", ("train", "--config=<tmp>/a.py", "--workdir=<new>"), PIPE, pipe("a.py")),
    Command("a plot of a pipe", ("plot", "<tmp>", "--out=<new>"), "cannot be read: " + PIPE, pipe("metrics.jsonl")),
    Command("a model too wide", train("<new>", "--config.model.d_model=1000000000"), "Parameters and optimizer take"),
    Command("an MLP too wide", train("<new>", "--config.model.mlp_dim=2000000000"), "Parameters and optimizer take"),
    Command("a batch too large", train("<new>", "--config.batch_size=1000000000"), "batch_size is 1000000000: a batch"),
    Command("a workdir that is no UTF-8", train("<tmp>/\udcff"), "\\udcff/checkpoints' is no UTF-8, which the path of"),
    in_the_way("a folder as lock", subfolder("train.lock"), sentence="'<tmp>/train.lock' is no file, where a run"),
    in_the_way("metrics of something else", file("metrics.jsonl", "loss\n1\n"), sentence="a line that is no row"),
    Command("a path of no file system", train("<new>", "--config.init_from=\ud800"), "which no file system can"),
    in_the_way("a list as files of data.json", file("data.json", '{"files": [1]}'), sentence="data.json' is damaged ("),
    in_the_way("a deep data.json", file("data.json", "[" * 100_000), sentence="data.json' is damaged (RecursionError)"),
    in_the_way("a data.json of no text", file("data.json", "{}"), sentence="data.json' is damaged (KeyError)"),
    in_the_way("a row of step 1e999", file("metrics.jsonl", '{"step": 1e999}\n'), sentence="a line that is no row"),
    in_the_way("a deep row", file("metrics.jsonl", "[" * 100_000 + "\n"), sentence="a line that is no row"),
    in_the_way(
        "checkpoints of nobody knows what",
        lambda folder: (folder / "checkpoints" / "3").mkdir(parents=True),
        sentence="'<tmp>' has checkpoints but no config.json, which says of what; restore it",
    ),
    # where measurements are written
    Command("rows into a folder", ("bench", "check", "--out=<tmp>"), "--out: '<tmp>' is a folder; it is a file"),
    Command("rows into a file's folder", ("bench", "train", "--config=<mqar.py>", "--out=<mqar.py>/x"), "is no folder"),
    Command("rows into a device", ("bench", "train", "--config=<mqar.py>", "--out=/dev/full"), "is a device or a pipe"),
    Command(
        "rows in place of a config", ("bench", "check", "--only=zzz", "--out=<mqar.py>"), "something else than rows"
    ),
    Command("rows into nothing", ("bench", "sanitize", "--out="), "Argument --out: it is '', which names nothing"),
    Command("no time to wait", ("bench", "check", "--limit=0"), "Argument --limit: it is 0, which is no time to wait"),
    # how a run goes on
    Command("another seed", train("<mqar_run>", "--config.seed=1"), OTHER_CONFIG + "seed is 0 there and 1 here"),
    Command(
        "a run of another width", train("<mqar_run>", "--config.model.d_model=32"), OTHER_CONFIG + "model.d_model is 16"
    ),
    Command("other batches", train("<mqar_run>", "--config.batch_size=16"), OTHER_CONFIG + "batch_size is 8 there"),
    Command("other data", train("<mqar_run>", "--config.data.shuffle=True"), OTHER_CONFIG + "data.shuffle is False"),
    Command(
        "fewer steps than were taken",
        train("<mqar_run>", "--config.steps=1", "--config.optim.warmup_steps=0"),
        "steps is 1, but the run in '<mqar_run>' has taken 2; it is at least that.",
    ),
    # what a run begins with
    Command("init_from nothing", train("<new>", "--config.init_from="), "init_from.path is '', which names nothing"),
    Command("init_from a bucket", train("<new>", "--config.init_from=gs://b/r"), "init_from.path is 'gs://b/r', an"),
    Command("init_from no folder", train("<new>", "--config.init_from=<tmp>/a"), "init_from.path '<tmp>/a' is neither"),
    Command("init_from no run", train("<new>", "--config.init_from=<corpus>"), "init_from.path '<corpus>' is neither"),
    Command(
        "init_from another width",
        train("<new>", "--config.model.d_model=32", "--config.init_from=<mqar_run>"),
        "is float32[64, 16] in '<mqar_run>/checkpoints/2' and float32[64, 32] here.",
    ),
    Command(
        "init_from another model",
        train("<new>", "--config.init_from=<text_run>"),
        "'<text_run>/checkpoints/2' has not the model's parameters: it lacks 'stacks",
    ),
    Command(
        "init_from no such step",
        train("<new>", "--config.init_from.path=<mqar_run>", "--config.init_from.step=9"),
        "has no checkpoint of step 9; it has [1, 2].",
    ),
    Command(
        "init_from by a pattern of nothing",
        train("<new>", "--config.init_from.path=<mqar_run>", "--config.init_from.include=('embd/*',)"),
        "init_from: 'embd/*' matches no parameter of",
    ),
    # values
    Command("no evaluation", train("<new>", "--config.eval_every=0"), "eval_every is 0; it is at least 1, or None."),
    Command(
        "fewer than none", train("<new>", "--config.max_skipped_steps=-1"), "max_skipped_steps is -1; it is at least 0."
    ),
    Command("no minutes", train("<new>", "--config.checkpoint.every_minutes=0"), "every_minutes is 0.0; it is above 0"),
    Command("samples of MQAR", train("<new>", "--config.sample_every=1"), "sample_every is 1, but data.kind is 'mqar'"),
    Command(
        "samples at no temperature",
        train("<new>", "--config.sample_every=1", "--config.samples.temperature=-1", config="text.py"),
        "temperature is -1.0",
    ),
    Call("load_run of nothing", lambda folder: load_run(""), "workdir is '', which names nothing"),
    Call("load_run of a bucket", lambda folder: load_run("s3://bucket/run"), "an address of 's3'"),
    Call("a zero byte", lambda folder: checked_workdir("a\0b"), "a path has no zero byte"),
    Call("load_config of no file", lambda folder: load_config("none.py"), "cannot be read: No such file"),
    Call("load_config of no model", lambda folder: load_config({"steps": 1}), "Config key 'model' is missing"),
)
