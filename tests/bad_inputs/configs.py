"""Configs and command lines."""

from tests.bad_inputs.cases import Call, Command


def override(*words: str, name: str = "", sentence: str) -> Command:
    """Return the case of `train` with further words, named by them."""
    return Command(name or " ".join(words), ("train", "--config=<mqar.py>", "--workdir=<new>", *words), sentence)


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
    override("--config.steps=ten", sentence="'steps' is 'ten'; it is int."),
    override("--config.batch_size=12", sentence="batch_size 12 cannot be divided over 8 devices"),
    override("--config.mesh.tensor=3", sentence="needs 6 devices; there are 8."),
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
)
