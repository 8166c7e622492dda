"""Configs and command lines."""

from pathlib import Path

from flax import nnx

from based_jax import config as configs
from based_jax.nn.lm import LM, LMConfig
from based_jax.nn.mixers import make_mixer
from based_jax.optim import OptimConfig
from based_jax.sweep.trial import make_trial
from based_jax.train.checkpoint import CheckpointConfig
from based_jax.train.run import TrainConfig
from tests.bad_inputs.cases import Call, Command


def override(*words: str, name: str = "", sentence: str) -> Command:
    """Return the case of `train` with further words, named by them."""
    return Command(name or " ".join(words), ("train", "--config=<mqar.py>", "--workdir=<new>", *words), sentence)


def written(name: str, text: str, sentence: str, *, others: dict[str, str] | None = None, variant: str = "") -> Command:
    """Return the case of a config file with this text, 'x.py', beside others."""

    def prepare(folder: Path):
        for file, content in {"x.py": text, **(others or {})}.items():
            (folder / file).write_bytes(content.encode("latin-1"))

    return Command(name, ("train", f"--config=<tmp>/x.py{variant}", "--workdir=<new>"), sentence, prepare)


def model(name: str, sentence: str, **options) -> Call:
    """Return the case of a model of one convolution with these options."""
    return Call(name, lambda folder: LMConfig(**{"layers": (("conv", {}),), "d_model": 16, **options}), sentence)


CIRCLE = """from ml_collections import ConfigDict
def get_config():
    config = ConfigDict({"steps": 1, "seed": 2})
    config.steps = config.get_ref("seed")
    config.seed = config.get_ref("steps")
    return config
"""


def holding_itself() -> dict:
    config: dict = {"data": {"kind": "mqar"}}
    config["model"] = config
    return config


CASES: tuple[Command | Call, ...] = (
    override("--config.model.d_modl=8", sentence="did you mean 'model.d_model'?"),
    override("--config.optim.learning=1", sentence="Unknown config key 'optim.learning'"),
    override("--config.model.layers=(('tailor', {}),)", sentence="did you mean 'taylor'?"),
    override("--config.model.layers=(('window', {'windw': 8}),)", sentence="did you mean 'window'?"),
    override("--config.model.layers=(('window', {'window': 0}),)", sentence="window is 0"),
    override("--config.model.layers=(('taylor', {'num_heads': 2, 'impl': 'xl'}),)", sentence="did you mean 'xla'?"),
    override(
        "--config.model.layers=(('attention', {'num_heads': 3}),)", sentence="d_model 16 cannot be divided into 3 heads"
    ),
    override("--config.data.kind=mqa", sentence="did you mean 'mqar'?"),
    override("--config.data.preset=tinny", sentence="did you mean 'tiny'?"),
    override("--config.optim.schedule=cosin", sentence="schedule 'cosin'"),
    override("--config.steps=0", sentence="steps is 0; it is at least 1."),
    override("--config.steps=ten", sentence="'steps' is 'ten'; it is an int, such as 128."),
    override("--config.rows_per_device=0", sentence="rows_per_device is 0; it is at least 1, or None."),
    override("--config.optim.muon.momentum=1", sentence="optim.muon.momentum is 1.0; it is at least 0 and below 1."),
    override("--config.batch_size=12", sentence="batch_size 12 cannot be divided over 8 devices"),
    override("--config.mesh.tensor=3", sentence="needs 6 devices; there are 8."),
    override(
        "--config.mesh.sequence=2",
        "--config.model.layers=(('hyena', {'l_max': 64}),)",
        sentence="Mesh axis 'sequence' has 2 devices; for long_conv, which needs all tokens of a row, it has 1.",
    ),
    Command(
        "tokens that sequence cannot divide",
        ("train", "--config=<text.py>", "--workdir=<new>", "--config.mesh.sequence=2", "--config.data.seq_len=31"),
        "Sequences of 31 tokens cannot be divided over 2 devices of the mesh axis 'sequence'.",
    ),
    override("--config.model.vocab_size=10", sentence="model.vocab_size is 10, but the data has ids up to 63."),
    override("--model.d_model=8", sentence="Unknown argument '--model.d_model=8'; overrides look like --config."),
    override("surplus", sentence="Unknown argument 'surplus'"),
    Command("no workdir", ("train", "--config=<mqar.py>"), "--workdir"),
    Command("no such command", ("trian",), "invalid choice: 'trian'"),
    Command(
        "no such file",
        ("train", "--config=<tmp>/none.py", "--workdir=<new>"),
        "Config file '<tmp>/none.py' cannot be read: No such file or directory.",
    ),
    Command("no such variant", ("train", "--config=<mqar.py>:big", "--workdir=<new>"), "has no variants, so not 'big'"),
    # synonyms, and keys of another section
    override("--config.lr=1", sentence="Unknown config key 'lr': did you mean 'optim.lr'?"),
    override("--config.optim.learning_rate=1", sentence="did you mean 'optim.lr'?"),
    override("--config.b1=0.9", sentence="did you mean 'optim.betas'?"),
    override(
        "--config.model.n_heads=2", sentence="did you mean 'num_heads' in the options of a mixer in 'model.layers'?"
    ),
    override("--config.hidden_size=8", sentence="did you mean 'model.d_model'?"),
    override("--config.model.n_layers=2", sentence="did you mean 'model.layers'?"),
    override("--config.context_length=32", sentence="did you mean 'data.seq_len'?"),
    override("--config.d_modl=8", sentence="did you mean 'model.d_model'?"),
    override("--config.save_every=2", sentence="did you mean 'checkpoint.every'?"),
    override("--config.model.layers=(('attention', {'n_heads': 2}),)", sentence="did you mean 'num_heads'?"),
    # keys as they are typed, types by example
    override("--config.model.d_model=0", sentence="model.d_model is 0; it is at least 1."),
    override("--config.optim.warmup_steps=-1", sentence="optim.warmup_steps is -1"),
    override("--config.optim.warmup_steps=200", sentence="optim.warmup_steps is 200, but the run has 2 steps"),
    override("--config.optim.decay=kernel", sentence="'kernel' (optim.decay): did you mean 'kernels'?"),
    override("--config.checkpoint.every=0", sentence="checkpoint.every is 0; it is at least 1."),
    override("--config.data.vocab_size=3", sentence="data.vocab_size 3 must be larger"),
    override(
        "--config.model.layers=(('conv', {}), ('window', {'window': -1}))", sentence="model.layers[1].window is -1"
    ),
    override(
        "--config.model.layers=(('window', {'window': 2.5}),)", sentence="'model.layers[0].window' is 2.5; it is an int"
    ),
    override(
        "--config.model.layers=(('window', {'window': True}),)",
        sentence="'model.layers[0].window' is True; it is an int",
    ),
    override(
        "--config.model.layers=(('gla', {'expand_k': '1'}),)", sentence="layers[0].expand_k' is '1'; it is a float"
    ),
    override(
        "--config.model.layers=('conv', {})", sentence="'model.layers[0]' is 'conv'; it is a tuple, such as ('conv',"
    ),
    override("--config.model.d_model=16.0", sentence="'model.d_model' is 16.0; it is an int, such as 128."),
    override("--config.model.scan_layers=1", sentence="'model.scan_layers' is 1; it is True or False."),
    override("--config.optim.lr=1j", sentence="'optim.lr' is of type complex; it is a float, such as 0.1."),
    override("--config.optim.lr=inf", sentence="'optim.lr' is 'inf'; it is a float, such as 0.1."),
    override("--config.optim.lr=1e999", sentence="optim.lr is inf; it is at least 0, and finite."),
    override("--config.mesh.data=two", sentence="'mesh.data' is 'two'; it is an int"),
    override("--config.model.items=3", sentence="Unknown config key 'model.items'"),
    override("--config.model.=3", sentence="Unknown config key 'model.'"),
    override(f"--config.seed={2**64}", sentence=f"'seed' is {2**64}; it is an int of 64 bits."),
    override("--config.seed=-1", sentence="seed is -1; it is between 0 and 9223372036854775807."),
    override("--config.steps=" + "9" * 300, name="many digits", sentence="'steps' is an int of 997 bits"),
    override("--config.steps={[]: 1}", sentence="'steps' is '{[]: 1}'; it is an int"),
    override(
        "--config.data.train=({'seq_len': 'a', 'num_kv_pairs': 1, 'num_examples': 8},)",
        sentence="'data.train[0].seq_len' is 'a'; it is an int, such as 128.",
    ),
    override("--config.data.test=({'seq_len': 8},)", sentence="'data.test[0].num_examples' is missing"),
    override("--config.data.test=3", sentence="it is a tuple, such as ({'num_examples': 128, "),
    override(
        "--config.model.d_model=1000000000000", sentence="model.d_model is 1000000000000; it is at most 2147483647."
    ),
    override(
        "--config.model.vocab_size=2147483648", sentence="model.vocab_size is 2147483648; it is at most 2147483647."
    ),
    override(
        "--config.model.pad_vocab_multiple=3000000000", sentence="model.pad_vocab_multiple is 3000000000; it is at most"
    ),
    override("--config.model.norm_eps=1e-50", sentence="model.norm_eps is 1e-50, which fp32 does not hold."),
    # files
    written("a name that is not there", "x = 1\ny = z\n", "NameError: name 'z' is not defined at <tmp>/x.py:2."),
    written(
        "an error inside a function",
        "def get_config():\n    return f()\n\ndef f():\n    return {}['k']\n",
        "Config '<tmp>/x.py' fails with KeyError: 'k' at <tmp>/x.py:5.",
    ),
    written(
        "an error inside a library",
        "import json\n\ndef get_config():\n    return json.loads('{')\n",
        "char 1) at <tmp>/x.py:4.",
    ),
    written(
        "an error of two lines in a file beside it",
        "import recipe\n",
        "fails with ValueError: one two at <tmp>/recipe.py:3.",
        others={"recipe.py": "\n\nraise ValueError('one\\ntwo.')\n"},
    ),
    written("no Python", "def f(: pass", "fails with SyntaxError: invalid syntax (x.py, line 1) at <tmp>/x.py:1."),
    written(
        "not UTF-8", "x = '\xff'\n", "fails with SyntaxError: (unicode error) 'utf-8' codec can't decode byte 0xff"
    ),
    written("no text", "\0\1\2", "fails with SyntaxError: source code string cannot contain null bytes."),
    written("sys.exit in a file", "import sys\nsys.exit(0)\n", "fails with SystemExit: 0 at <tmp>/x.py:2."),
    written(
        "sys.exit in get_config",
        "def get_config():\n    raise SystemExit\n",
        "Config '<tmp>/x.py' fails with SystemExit at <tmp>/x.py:2.",
    ),
    written(
        "no end", "def get_config():\n    return get_config()\n", "fails with RecursionError: maximum recursion depth"
    ),
    written(
        "async", "async def get_config():\n    return {}\n", "is of type coroutine; get_config returns a ConfigDict."
    ),
    written(
        "a generator", "def get_config():\n    yield {}\n", "is of type generator; get_config returns a ConfigDict."
    ),
    written(
        "a variant that is needed",
        "VARIANTS = ('a', 'b')\ndef get_config(variant):\n    return {}\n",
        "needs a variant, as in '<tmp>/x.py:VARIANT'; it is one of a, b.",
    ),
    written(
        "no end of references", CIRCLE, "fails with MutabilityError: Found cycle in reference graph at <tmp>/x.py:5."
    ),
    written(
        "a generator in a config",
        "def get_config():\n    return {'model': (i for i in ())}\n",
        "holds a value that is none",
    ),
    written(
        "a placeholder that nobody fills",
        "from ml_collections import config_dict as c\n\ndef get_config():\n"
        "    return c.ConfigDict({'steps': c.required_placeholder(int)})\n",
        "Config key 'steps' is a reference that fails with RequiredValueError",
    ),
    written("lines in a key", "def get_config():\n    return {'a\\nb': 1}\n", "Unknown config key 'a b': "),
    written("what is no Exception", "raise GeneratorExit\n", "fails with GeneratorExit at <tmp>/x.py:1."),
    written(
        "an error that cannot be told",
        "class E(Exception):\n    def __str__(self):\n        raise ValueError\n\nraise E\n",
        "Config file '<tmp>/x.py' fails with E at <tmp>/x.py:5.",
    ),
    Command("a folder", ("train", "--config=<tmp>", "--workdir=<new>"), "'<tmp>' cannot be read: Is a directory."),
    Command("an empty path", ("train", "--config=", "--workdir=<new>"), "'' cannot be read: No such file"),
    # the API
    model("a forgotten comma", "'layers[0]' is 'conv'; it is a tuple, such as", layers=("conv", {})),
    model("options that are no dict", "'layers[0][1]' is 3; it is a dict, such as", layers=(("conv", 3),)),
    model(
        "a head count as text", "'layers[0].num_heads' is '2'; it is an int", layers=(("taylor", {"num_heads": "2"}),)
    ),
    model("a width as a float", "'d_model' is 16.0; it is an int, such as 128.", d_model=16.0),
    model("a dtype that is none", "'dtype' is of type type; it is a str", dtype=dict),
    model("a dtype that layers do not take", "Unknown dtype 'int8'", dtype="int8"),
    Call("a rate as text", lambda folder: OptimConfig(lr="fast"), "'lr' is 'fast'; it is a float, such as 0.1."),  # type: ignore[arg-type]
    Call(
        "half a step", lambda folder: CheckpointConfig(every=0.5), "'every' is 0.5; it is an int, such as 128, or None."
    ),  # type: ignore[arg-type]
    Call(
        "a mixer's option as text",
        lambda folder: make_mixer("attention", 16, rngs=nnx.Rngs(0), num_heads="2"),
        "'num_heads' is '2'; it is an int",
    ),
    Call(
        "a model's second layer",
        lambda folder: LM(LMConfig((("conv", {}), ("attention", {"num_heads": 3})), 16), rngs=nnx.Rngs(0)),
        "model.layers[1]: d_model 16 cannot be divided into 3 heads",
    ),
    Call(
        "a config that holds itself", lambda folder: configs.overridden(holding_itself(), {}), "The config has no end"
    ),
    Call(
        "a seed that lanes cannot hold",
        lambda folder: make_trial(
            {"model": {"layers": [["conv", {}]], "d_model": 8}, "data": {"kind": "mqar"}}, {"seed": 2**32}
        ),
        "seed is 4294967296; it is between 0 and 4294967295.",
    ),
    Call("a null byte", lambda folder: configs.load("a\0b"), "cannot be read: embedded null byte."),
    Call(
        "a number as a key",
        lambda folder: configs.build(TrainConfig, configs.overridden({3: 4}, {})),
        "Unknown config key '3'",
    ),
)
