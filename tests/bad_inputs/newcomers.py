"""Mixers that are new: their skeletons, and what is held to the contracts; looks inside runs."""

from based_jax.nn.lm import LMConfig
from tests.bad_inputs.cases import Call, Command

BROKEN = """
from based_jax.nn.mixers.conv import GatedConv
class Wrong(GatedConv):
    def state_size(self, seq_len):
        return 1
number = 3
"""


def mixers(text):
    """Return what writes this into '<tmp>/mixers.py'."""
    return lambda folder: (folder / "mixers.py").write_text(text)


def skeleton(name, words, sentence, prepare=lambda folder: None):
    """Return the case of a skeleton that is not written."""
    return Command(name, ("new-mixer", *words), sentence, prepare)


def frontier(name, words, sentence, text=BROKEN):
    """Return the case of a mixer that is not drawn."""
    return Command(name, ("frontier", *words), sentence, mixers(text))


CASES: tuple[Command | Call, ...] = (
    Command(
        "inside of no run", ("inside", "--workdir=<new>", "--out=<tmp>/out"), "'<new>' is no run: it has no config"
    ),
    Command(
        "inside of no batches",
        ("inside", "--workdir=<mqar_run>", "--out=<tmp>/out", "--batches=0"),
        "--batches is 0; it is at least 1.",
    ),
    Command("inside into nowhere", ("inside", "--workdir=<mqar_run>", "--out="), "--out is '', which names nothing"),
    skeleton("a mixer of capitals", ("MyMixer",), "'MyMixer' is no name of a mixer; it is of small letters, digits"),
    skeleton("a mixer of another folder", ("../mixer",), "'../mixer' is no name of a mixer; it is of small letters"),
    skeleton(
        "a mixer called as all are", ("mixer", "--file=x.py"), "The class of 'mixer' would be Mixer, which the skel"
    ),
    skeleton("a mixer called as a word of Python", ("lambda",), "'lambda' is no name of a mixer"),
    skeleton("a mixer that there is", ("taylor",), "There is a mixer 'taylor'; choose another name."),
    skeleton("a mixer outside of a checkout", ("my_mixer",), "'.' is no checkout of based_jax (based_jax/nn/mixers/__"),
    skeleton("a mixer into a text", ("my_mixer", "--file=mixer.txt"), "--file is 'mixer.txt'; it ends in .py."),
    skeleton("a mixer into nowhere", ("my_mixer", "--file=no/mixer.py"), "there is no folder 'no'."),
    skeleton(
        "a mixer over a file",
        ("my_mixer", "--file=mixers.py"),
        "'mixers.py' is there already, and stays as it is; choose another name.",
        mixers("mine"),
    ),
    frontier("a frontier of no file", ("no.py:Wrong",), "File 'no.py' cannot be read: No such file or directory."),
    frontier("a frontier of no class", ("mixers.py",), "'mixers.py' names no class; it is path/to/file.py:Class."),
    frontier("a frontier of another class", ("mixers.py:Wrng",), "Unknown class of 'mixers.py' 'Wrng': did you mean"),
    frontier("a frontier of a number", ("mixers.py:number",), "Unknown class of 'mixers.py' 'number'"),
    frontier(
        "a frontier of a file without classes",
        ("mixers.py:A",),
        "'mixers.py' has no class 'A'; it defines none.",
        "x = 1",
    ),
    frontier("a frontier of no mixer", ("mixers.py:int",), "did you mean", "class Int: pass"),
    frontier(
        "a frontier of a class", ("mixers.py:Int",), "The class Int is no mixer; it is a subclass", "class Int: pass"
    ),
    frontier("a frontier of a file that fails", ("mixers.py:A",), "fails with ZeroDivisionError", "1 / 0"),
    frontier("a frontier of no such mixer", ("tailor",), "Unknown mixer 'tailor': did you mean 'taylor'?"),
    frontier("a frontier of odd options", ("taylor", "--options", "8"), "--options has '8'; it is a dict of options"),
    frontier(
        "a frontier of other options",
        ("taylor", "--options", "{'heads': 1}"),
        "2 of 2 points cannot be trained, first {'model.layers': (('conv', {'expand': 2}), ('taylor', {'heads': 1}))",
    ),
    Call(
        "a layer of a number", lambda _: LMConfig(((3, {}),), 8), "layers[0] is of 3; it is of a mixer's name or class."
    ),
    Call("a layer of a class", lambda _: LMConfig(((int, {}),), 8), "layers[0]: The class int is no mixer"),
    Call(
        "a layer of a class's name",
        lambda _: LMConfig((("Own@01234567", {}),), 8),
        "'Own@01234567' is a mixer from outside the package, of which a file keeps no more than the name; give its",
    ),
)
