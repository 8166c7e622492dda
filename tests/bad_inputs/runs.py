"""Workdirs, stores and the commands that read them."""

from tests.bad_inputs.cases import Call, Command


def broken_config(folder):
    (folder / "config.json").write_text('{"model": ')


CASES: tuple[Command | Call, ...] = (
    Command("eval of no run", ("eval", "--workdir=<new>"), "'<new>' is no run: it has no config.json."),
    Command("generate of no run", ("generate", "--workdir=<new>", "--prompt=a"), "'<new>' is no run"),
    Command("export of no run", ("export", "<new>", "--hf=<tmp>/hf"), "'<new>' is no run"),
    Command("eval of no such step", ("eval", "--workdir=<mqar_run>", "--step=7"), "has no checkpoint of step 7"),
    Command("half a config.json", ("eval", "--workdir=<tmp>"), "config.json' is no config", broken_config),
    Command(
        "eval with an override",
        ("eval", "--workdir=<mqar_run>", "--config.steps=3"),
        "Unknown argument '--config.steps=3' for 'eval'",
    ),
    Command("generate of MQAR", ("generate", "--workdir=<mqar_run>", "--prompt=a"), "generate needs a run on 'text'"),
    Command(
        "a window longer than the text",
        ("train", "--config=<text.py>", "--workdir=<new>", "--config.data.seq_len=5000"),
        "seq_len 5000 is longer than the data",
    ),
)
