"""Weights in and out."""

import json
import os
from pathlib import Path

import numpy as np
from helpers import torch_files
from safetensors.numpy import save_file

from tests.bad_inputs.cases import Call, Command

D, F, ROWS = 8, 16, 264
FIELDS = {"n_embd": D, "n_layer": 1, "n_head": 2, "n_inner": F, "vocab_size": 257, "rotary_emb_fraction": 0.5}
FIELDS |= {"based_jax": {"tokenizer": "bytes"}}
LAYER = "transformer.layers.0."
WEIGHTS = {
    "transformer.embeddings.word_embeddings.weight": (ROWS, D),
    "transformer.ln_f.weight": (D,),
    f"{LAYER}mixer.Wqkv.weight": (3 * D, D),
    f"{LAYER}mixer.out_proj.weight": (D, D),
    f"{LAYER}norm1.weight": (D,),
    f"{LAYER}norm2.weight": (D,),
    f"{LAYER}mlp.fc1.weight": (2 * F, D),
    f"{LAYER}mlp.fc2.weight": (D, F),
}
ARRAYS = {key: np.ones(shape, np.float32) for key, shape in WEIGHTS.items()}


def released(*, config=None, without=None, arrays=None, files=None, **fields):
    """Return a function that makes an attention model's folder, with something in it that is not as it should be."""

    def prepare(folder: Path):
        text = json.dumps(FIELDS | fields).encode() if config is None else config
        (folder / "config.json").write_bytes(text)
        own = {key: array for key, array in ARRAYS.items() if key != without} | (arrays or {})
        if files is None:
            save_file(own, folder / "model.safetensors")
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)

    return prepare


def torch_file(content=None):
    """Return a function that makes a folder with torch's file of no arrays, or of another pickle."""

    def prepare(folder: Path):
        released(files={})(folder)
        torch_files.write(folder / "pytorch_model.bin", {}, content=content)

    return prepare


def pipe(name, **files):
    """Return a function that makes a model's folder with a pipe in it, into which nobody writes."""

    def prepare(folder: Path):
        released(files=files)(folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return prepare


def hf(name, sentence, prepare):
    """Return the case of a folder that `generate` is to read."""
    return Command(name, ("generate", "--hf=<tmp>", "--prompt=a"), sentence, prepare)


def export(name, *words, sentence, prepare=lambda folder: None):
    """Return the case of an export of a run on text."""
    return Command(name, ("export", "<text_run>", *words), sentence, prepare)


OURS = b'{"model_type": "based_jax", "based_jax": {"tokenizer": "bytes"}}'
OTHER_LAYERS = OURS[:-1] + b', "num_layers": 1, "model": {"layers": [["conv", {}], ["conv", {}]]}}'
HEADER = (1000).to_bytes(8, "little")
INDEX = "model.safetensors.index.json"
COMMAND = b"\x80\x02cos\nsystem\n(" + torch_files.text("touch ran") + b"tR."

CASES: tuple[Command | Call, ...] = (
    hf("a pipe as a model's config", "config.json' cannot be read: It is a pipe or", pipe("config.json")),
    hf("a pipe as weights", "model.safetensors' cannot be read: It is a pipe or", pipe("model.safetensors")),
    hf("a pipe as torch's weights", "pytorch_model.bin' cannot be read: It is a pipe or", pipe("pytorch_model.bin")),
    export("safetensors in /proc", "--safetensors=/proc/x", sentence="'/proc/x' cannot be written: No such file or"),
    export(
        "Orbax at no UTF-8", "--orbax=<tmp>/\udcff", sentence="\\udcff' is no UTF-8, which the path of a checkpoint"
    ),
    export("Orbax in /proc", "--orbax=/proc/x", sentence="'/proc/x' cannot be written: No such file or directory."),
    hf("no config.json", "config.json' cannot be read: ", lambda folder: None),
    hf(
        "a config.json that is not UTF-8",
        "'<tmp>/config.json' cannot be read: 'utf-8' codec",
        released(config=b"\xff{}"),
    ),
    hf("a config.json of a list", "'<tmp>/config.json' holds a list; it is a JSON object.", released(config=b"[1]")),
    hf("a config.json of brackets", "cannot be read: ", released(config=b"[" * 100_000)),
    hf("an empty config.json of a model", "names no tokenizer", released(config=b"{}")),
    hf("a model_type of none", "Unknown model_type of config.json 'lama'", released(model_type="lama", based_jax={})),
    hf("ten million layers", "they are of 1 layers, and n_layer is 10000000.", released(n_layer=10**7)),
    hf("ours without a model", "'<tmp>/config.json' lacks 'model' of this package.", released(config=OURS)),
    hf(
        "ours of other layers", "num_layers is 1 in config.json, but model.layers has 2;", released(config=OTHER_LAYERS)
    ),
    hf("no layers", "n_layer is 0; it is at least 1.", released(n_layer=0)),
    hf("layers beyond all", "n_layer is 1000000000000, which is no int of a model.", released(n_layer=10**12)),
    hf("a width in words", "n_embd is '8', which is no int of a model.", released(n_embd="8")),
    hf("a true width", "n_embd is True, which is no int of a model.", released(n_embd=True)),
    hf("another width", "has shape (264, 8); the model's is (264, 16).", released(n_embd=16)),
    hf("heads that do not divide", "d_model 8 cannot be divided into 3 heads", released(n_head=3)),
    hf("no heads", "num_heads is 0; it is at least 1.", released(n_head=0)),
    hf("a hidden width of half", "n_inner is 16.5, which is no int", released(n_inner=16.5)),
    hf(
        "an infinite base",
        "rotary_emb_base is inf, which is no float of a model.",
        released(rotary_emb_base=float("inf")),
    ),
    hf("biases", "qkv_proj_bias is True in config.json; only False is supported.", released(qkv_proj_bias=True)),
    hf("an eps of none", "norm_eps is 0.0; it is above 0, and finite.", released(layer_norm_epsilon=0)),
    hf("a tokenizer of none", "Unknown tokenizer 'byte'", released(based_jax={"tokenizer": "byte"})),
    hf("no weights", "'<tmp>' has no weights: neither model.safetensors nor pytorch_model.bin", released(files={})),
    hf(
        "half of safetensors", "'<tmp>/model.safetensors' cannot be read", released(files={"model.safetensors": HEADER})
    ),
    hf(
        "an empty file of weights",
        "'<tmp>/model.safetensors' cannot be read",
        released(files={"model.safetensors": b""}),
    ),
    hf("a missing array", f"The weights lack '{LAYER}norm1.weight' (8,)", released(without=f"{LAYER}norm1.weight")),
    hf(
        "an array too many", f"The weights have '{LAYER}a' (2,)", released(arrays={f"{LAYER}a": np.ones(2, np.float32)})
    ),
    hf(
        "an array of another shape",
        f"'{LAYER}norm1.weight' has shape (9,); the model's is (8,).",
        released(arrays={f"{LAYER}norm1.weight": np.ones(9, np.float32)}),
    ),
    hf(
        "an array of integers",
        f"'{LAYER}norm1.weight' is of int32; parameters are floating-point numbers.",
        released(arrays={f"{LAYER}norm1.weight": np.ones(8, np.int32)}),
    ),
    hf("an index of nothing", f"'<tmp>/{INDEX}' has no weight_map", released(files={INDEX: b"{}"})),
    hf("a shard elsewhere", "names the file '../x'", released(files={INDEX: b'{"weight_map": {"a": "../x"}}'})),
    hf("a shard that is no name", "names the file 3", released(files={INDEX: b'{"weight_map": {"a": 3}}'})),
    hf(
        "a shard that is missing",
        "'<tmp>/x.st' cannot be read",
        released(files={INDEX: b'{"weight_map": {"a": "x.st"}}'}),
    ),
    hf("a pickle that runs a command", "its pickle asks for 'os.system'", torch_file(COMMAND)),
    hf("a torch file of nothing", "The weights lack 'transformer.layers.0'", torch_file()),
    hf(
        "torch's files of old",
        "is no zip file, as torch has written",
        released(files={"pytorch_model.bin": b"\x80\x02."}),
    ),
    Command("no folder of weights", ("generate", "--hf=", "--prompt=a"), "folder is '', which names nothing"),
    Command(
        "a folder elsewhere", ("generate", "--hf=gs://a/b", "--prompt=a"), "folder is 'gs://a/b', an address of 'gs'"
    ),
    Command(
        "a file for a folder", ("generate", "--hf=<text.py>", "--prompt=a"), "<text.py>/config.json' cannot be read"
    ),
    Command(
        "a step of a folder",
        ("generate", "--hf=<tmp>", "--step=3", "--prompt=a"),
        "--step is 3, but a folder has no steps",
    ),
    Command(
        "no tokenizer of that name",
        ("generate", "--hf=<tmp>", "--tokenizer=gpt3", "--prompt=a"),
        "did you mean 'gpt2'?",
        released(),
    ),
    Command(
        "a tokenizer that is no file",
        ("generate", "--hf=<tmp>", "--tokenizer=<tmp>/config.json", "--prompt=a"),
        "'<tmp>/config.json' is no file of a tokenizer",
        released(),
    ),
    export(
        "a layout of no name", "--hf=<new>", "--layout=lama", sentence="Unknown layout 'lama': did you mean 'llama'"
    ),
    Command("export of no GGUF file", ("export", "none.gguf", "--hf=<new>"), "'none.gguf' is no file"),
    Command("export of a step of GGUF", ("export", "x.gguf", "--hf=<new>", "--step=3"), "--step is 3, but a GGUF file"),
    export("an export to nowhere", sentence="Nothing to write; give --hf=DIR, --orbax=DIR or --safetensors=FILE."),
    export("an export to no name", "--hf=", sentence="--hf is '', which names nothing"),
    export("an export to a URL", "--orbax=gs://a/b", sentence="--orbax is 'gs://a/b', an address of 'gs'"),
    export("an export onto a file", "--hf=<text.py>", sentence="'<text.py>' is not empty; name a new one."),
    export("an export into a run", "--orbax=<text_run>", sentence="'<text_run>' is not empty"),
    export("an export below a file", "--safetensors=<text.py>/x", sentence="'<text.py>/x' cannot be written"),
    export("an export of which one fails", "--hf=<new>", "--orbax=<text_run>", sentence="'<text_run>' is not empty"),
    export("an export of no such step", "--hf=<new>", "--step=77", sentence="has no checkpoint of step 77"),
)
