"""Text, tokenizers and synthetic tasks."""

import gzip
import io
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from based_jax.data import mqar, needle, state_tracking
from based_jax.data.hosts import own_rows
from based_jax.data.tokenizer import get_tokenizer
from based_jax.train.tasks import TASKS
from tests.bad_inputs.cases import Call, Command


def synthetic(kind: str, override: str, sentence: str) -> Command:
    """Return the case of a synthetic task with one value replaced."""
    words = (
        "train",
        "--config=<mqar.py>",
        "--workdir=<new>",
        f"--config.data.kind={kind}",
        f"--config.data.{override}",
    )
    return Command(f"{kind} {override}", words, sentence)


def text(*overrides: str, sentence: str, name: str = "", prepare=lambda folder: None) -> Command:
    """Return the case of training on text with values replaced."""
    words = [f"--config.data.{override}" for override in overrides]
    return Command(
        name or " ".join(overrides), ("train", "--config=<text.py>", "--workdir=<new>", *words), sentence, prepare
    )


def corpus(name: str, content: bytes, sentence: str) -> Command:
    """Return the case of a corpus of a good file and of one with this content."""

    def prepare(folder):
        (folder / "a.txt").write_text("Good text. " * 99)
        (folder / name).write_bytes(content)

    return text("path=<tmp>", sentence=sentence, name=f"{name}: {sentence[:40]}", prepare=prepare)


def dna(name: str, content: bytes, *overrides: str, sentence: str) -> Command:
    """Return the case of training on a FASTA file of this name and content, with values replaced."""

    def prepare(folder):
        model = {"layers": [["conv", {}]], "d_model": 8, "vocab_size": 5}
        values = {"model": model, "data": {"kind": "dna", "path": name, "seq_len": 8}}
        (folder / "dna.py").write_text(f"def get_config():\n    return {values!r}\n")
        (folder / name).write_bytes(content)

    words = ("train", "--config=<tmp>/dna.py", "--workdir=<new>", *(f"--config.data.{x}" for x in overrides))
    return Command(f"DNA {name} {' '.join(overrides)}", words, sentence, prepare)


def parquet(**columns) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def two_texts() -> bytes:
    """Return a parquet file of two columns of the same name."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), sink)
    return sink.getvalue().to_pybytes()


def broken_utf8() -> bytes:
    """Return a parquet file whose text is no UTF-8."""
    offsets = pa.array([0, 1], pa.int32()).buffers()[1]
    return parquet(text=pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff")]))


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def mixture(weight: str = "1.0", name: str = "wiki", path: str = "<corpus>") -> str:
    """Return the override of a mixture of one part."""
    return f"mixture={{{name!r}: {{'path': {path!r}, 'weight': {weight}}}}}"


def tokens(name: str, content: bytes, sentence: str) -> Command:
    """Return the case of a corpus of one file of tokens with this content."""

    def prepare(folder):
        (folder / name).write_bytes(content)

    return text("path=<tmp>", sentence=sentence, name=f"{name}: {sentence[:40]}", prepare=prepare)


def npy(array) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def another_text(folder):
    (folder / "other").mkdir()
    (folder / "other" / "cats.txt").write_text("Other text. " * 99)


def link_to_nothing(folder):
    (folder / "a.txt").symlink_to(folder / "gone.txt")


NOISE = bytes(np.random.default_rng(0).integers(97, 122, 5000, np.uint8))
TWO_LINES = b'{"text": "a"}\n'

BASES = b">a\n" + 9 * b"ACGT"
CASES: tuple[Command | Call, ...] = (
    dna("letter.fa", BASES + b"\nAXA", sentence="/letter.fa' has 'X' in the record 'a'; letters are ACGTNRYSWKMBDHV."),
    dna(
        "protein.txt", b"MKV", sentence="/protein.txt' begins with 'MKV'; it begins with '>' and the name of a record."
    ),
    dna("short.fa", b">a\nACGTACGT", sentence="/short.fa: a record is of 20 and more."),
    dna("broken.fa.gz", b"ACGT", sentence="/broken.fa.gz' cannot be read: Not a gzipped file"),
    dna(
        "none.fa", BASES, "path=<new>", sentence="path is '<new>', which does not exist; it is a FASTA file or a folder"
    ),
    dna("empty.fa", BASES, "path=", sentence="path is '', which names nothing"),
    dna("length.fa", BASES, "seq_len=0", sentence="seq_len is 0; it is at least 1."),
    dna("zero.fa", BASES, "test_lengths=(8,0)", sentence="test_lengths is 0; it is at least 1."),
    dna("twice.fa", BASES, "test_lengths=(8,8)", sentence="test_lengths are [8, 8]; they differ."),
    text("seed=-1", sentence="seed -1 must be at least 0 and below 2**64."),
    text("seed=18446744073709551616", sentence="'data.seed' is 18446744073709551616"),
    text("seed=1.5", sentence="'data.seed' is 1.5"),
    text("seq_len=0", sentence="seq_len is 0; it is at least 1."),
    text("processes=0", sentence="processes is 0; it is 1 to 1024."),
    text("processes=2.5", sentence="'data.processes' is 2.5; it is an int"),
    text("tokenizer=gpt-2", sentence="did you mean 'gpt2'?"),
    text("tokenizer=<new>.json", sentence="'<new>.json' is no file of a tokenizer: No such file or directory"),
    text("path=", sentence="path is '', which names nothing"),
    text("path=gs://bucket/text", sentence="path is 'gs://bucket/text', an address of 'gs'"),
    text("cache_dir=", sentence="cache_dir is '', which names nothing"),
    text("path=<new>", sentence="Corpus '<new>' is no folder; it holds files ending in .txt, "),
    text("path=<tmp>", sentence="Corpus '<tmp>' has no file that ends in .txt, "),
    text(
        "path=<tmp>",
        name="no text among the files",
        prepare=lambda folder: (folder / "a.json").write_text("[]"),
        sentence="; there is a.json.",
    ),
    text(
        "path=<tmp>", name="a link to nothing", prepare=link_to_nothing, sentence="a.txt' cannot be read: No such file"
    ),
    text(
        "path=<tmp>",
        name="validation alone",
        prepare=lambda folder: (folder / "val.txt").write_text("a" * 999),
        sentence="Corpus '<tmp>' has validation files only; it needs one to train on.",
    ),
    text(
        "path=<tmp>",
        name="blank documents alone",
        prepare=lambda folder: (folder / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n'),
        sentence="Corpus '<tmp>' has no text to train on: all its documents are blank.",
    ),
    text("text_feature=body", sentence="text_feature is 'body', but corpus '<corpus>' has .txt files alone"),
    text(
        "path=<tmp>",
        name="packed text of which a part was copied",
        prepare=lambda folder: (folder / "validation.tokens").write_bytes(b"ab"),
        sentence="Packed text '<tmp>' is damaged (index.json: FileNotFoundError)",
    ),
    text("text_feature=", sentence="text_feature is '', which names nothing; it is a key"),
    text("text_feature=body", "path=None", sentence="text_feature is 'body', but path is None"),
    text(
        "text_feature=body",
        "path=<tmp>",
        prepare=lambda folder: (folder / "a.npy").write_bytes(npy(np.zeros(99, np.uint16))),
        sentence="text_feature is 'body', but corpus '<tmp>' has tokens; it is None there.",
    ),
    text(
        "text_feature=body",
        "path=<tmp>",
        name="a feature that no column has",
        prepare=lambda folder: (folder / "a.parquet").write_bytes(parquet(text=["a"])),
        sentence="a.parquet' has no column 'body'; it has text.",
    ),
    text(
        "text_feature=body",
        "path=<tmp>",
        name="a feature that no line has",
        prepare=lambda folder: (folder / "a.jsonl").write_bytes(TWO_LINES),
        sentence='a.jsonl\', line 1, is no JSON object with a "body"',
    ),
    text(mixture(), sentence="path is '<corpus>', but there is a mixture, whose parts have paths"),
    text("path=None", "mixture={}", sentence="mixture is {}; it has a part, such as"),
    text("path=None", "mixture=a:1", sentence="'data.mixture' is 'a:1'; it is a dict, such as {'name': {'path': "),
    text("path=None", "mixture={'a': {}}", sentence="'data.mixture.a.path' is missing"),
    text("path=None", "mixture.a.wait=2", sentence="'data.mixture.a.wait': "),
    text("path=None", mixture("0.0"), sentence="mixture.wiki.weight is 0.0; it is a number above 0."),
    text("path=None", mixture("-1"), sentence="mixture.wiki.weight is -1.0; it is a number above 0."),
    text("path=None", mixture("1e999"), sentence="mixture.wiki.weight is inf; it is a number above 0."),
    text(
        "path=None",
        "mixture={'a': {'path': '<corpus>', 'weight': 1e308}, 'b': {'path': '<corpus>', 'weight': 1e308}}",
        sentence="mixture has weights whose sum is beyond the largest float",
    ),
    text("path=None", mixture("'half'"), sentence="'data.mixture.wiki.weight' is 'half'; it is a float"),
    text("path=None", mixture(name="a/b"), sentence="mixture has a part 'a/b'; a name is of letters, digits, '_'"),
    text("path=None", mixture(path="<new>"), sentence="Corpus '<new>' is no folder"),
    text("path=None", mixture(path="gs://text"), sentence="mixture.wiki.path is 'gs://text', an address of 'gs'"),
    text(
        "path=None",
        "mixture={'a': {'path': '<corpus>'}, 'b': {'path': '<corpus>', 'weight': 1e-9}}",
        sentence="mixture.b.weight is 1e-09, under a millionth of the largest; leave the part out.",
    ),
    Command(
        "preparing what keeps nothing",
        ("prepare", "--config=<mqar.py>"),
        "data.kind is 'mqar', which keeps nothing; it is 'text' to prepare.",
    ),
    text("path=tfds:", sentence="Dataset ''"),
    text("path=tfds:no_such_data", sentence="Dataset 'no_such_data' is none of tfds.list_builders()"),
    text("cache_dir=<mqar.py>", sentence="Packed text cannot be written to '<mqar.py>': "),
    Command(
        "another text in a workdir",
        ("train", "--config=<text.py>", "--workdir=<text_run>", "--config.data.path=<tmp>/other"),
        "is not what the run in '<text_run>' began with: cats.txt has changed; bring the text back",
        another_text,
    ),
    corpus("latin.txt", "caf\xe9 au lait".encode("latin-1"), "latin.txt' is not UTF-8 text: "),
    corpus("utf16.txt", "text".encode("utf-16"), "utf16.txt' is not UTF-8 text: invalid start byte at byte 0, line 1."),
    corpus(
        "half.txt", "caf\xe9".encode()[:-1], "half.txt' is not UTF-8 text: unexpected end of data at its last byte."
    ),
    corpus("late.jsonl", TWO_LINES * 2000 + b'{"text": "\xff"}', "invalid start byte at byte 28010, line 2001."),
    corpus("no.jsonl", TWO_LINES + b'{"no": 1}\n', 'no.jsonl\', line 2, is no JSON object with a "text"'),
    corpus("list.jsonl", TWO_LINES + b"[1]\n", "list.jsonl', line 2, is no JSON object"),
    corpus("number.jsonl", TWO_LINES + b'{"text": 5}\n', "number.jsonl', line 2, is no JSON object"),
    corpus("cut.jsonl", TWO_LINES + b'{"text": "a', "cut.jsonl', line 2, is no JSON object"),
    corpus("deep.jsonl", TWO_LINES + b"[" * 200_000, "deep.jsonl', line 2, is no JSON object"),
    corpus("cut.txt.xz", lzma.compress(NOISE)[:400], "cut.txt.xz' cannot be read: "),
    corpus("cut.txt.gz", gzip.compress(NOISE)[:400], "cut.txt.gz' cannot be read: "),
    corpus("bad.txt.gz", gzip.compress(NOISE)[:400] + b"?" * 400, "bad.txt.gz' cannot be read: "),
    corpus("no.txt.gz", b"no gzip", "no.txt.gz' cannot be read: Not a gzipped file"),
    corpus("cut.txt.zst", zstd(NOISE)[:400], "cut.txt.zst' cannot be read: Truncated compressed stream."),
    corpus("no.txt.zst", b"no zstd here", "no.txt.zst' cannot be read: "),
    corpus("cut.jsonl.zst", zstd(NOISE)[:400], "cut.jsonl.zst' cannot be read: "),
    tokens("a.npy", npy(np.zeros(9, np.int64)), "a.npy' has 1 axis of int64; tokens are one axis of uint16 or uint32."),
    tokens("a.npy", npy(np.zeros((2, 9), np.uint16)), "a.npy' has 2 axes of uint16; tokens are one axis of uint16 or"),
    tokens("header.npy", npy(np.zeros(9, np.uint16)).replace(b"<u2'", b"<u2 "), "its header is damaged"),
    tokens("cut.npy", npy(np.zeros(99, np.uint16))[:-8], "cut.npy' says that it has 99 tokens, but has 95."),
    tokens("no.npy", b"no array", "no.npy' cannot be read: "),
    tokens("odd.bin", b"abc", "odd.bin' has 3 bytes, which are no whole number of uint16 tokens."),
    tokens("odd.uint32.bin", b"abcdef", "odd.uint32.bin' has 6 bytes, which are no whole number of uint32 tokens."),
    tokens("wide.bin", np.arange(99, dtype="<u4").tobytes(), "wide.bin' has a 0 as every other uint16, as tokens of"),
    tokens("high.bin", b"\1\0\1\1" * 99, "high.bin' has id 257 as its token 197; the tokenizer's ids are below 257."),
    tokens("none.bin", b"", "has 0 tokens; it needs more to train on and to validate with."),
    tokens("val.bin", b"abcd", "Corpus '<tmp>' has validation files only; it needs one to train on."),
    tokens("few.bin", b"a\0b\0", "data.seq_len 32 is longer than the data: '<tmp>' has 2 tokens to train on."),
    corpus("no.parquet", b"no parquet here", "no.parquet' cannot be read: "),
    corpus("cut.parquet", parquet(text=["a"])[:-9], "cut.parquet' cannot be read: "),
    corpus("other.parquet", parquet(content=["a"], id=[1]), "has no column 'text'; it has content, id."),
    corpus("twice.parquet", two_texts(), "twice.parquet' has 2 columns 'text'; it has one."),
    corpus("none.parquet", parquet(), "none.parquet' has no column 'text'; it has none."),
    corpus("numbers.parquet", parquet(text=[1, 2]), "has a column 'text' of int64; it is string."),
    corpus("latin.parquet", broken_utf8(), "latin.parquet' "),
    synthetic("mqar", "seed=-1", "seed -1 must be at least 0 and below 2**32."),
    synthetic("mqar", "seed=9223372036854775809", "'data.seed' is 9223372036854775809"),
    synthetic("mqar", "test=()", "mqar has no test segment; it needs one to evaluate."),
    synthetic("mqar", "vocab_size=32", "vocab_size 32 must be larger than seq_len 32."),
    synthetic("mqar", "power_a=0", "power_a 0.0 must be a number above 0 and at most 10; 1 is uniform."),
    synthetic("mqar", "power_a=1e3", "power_a 1000.0 must be"),
    synthetic(
        "mqar", "train=[{'num_examples': 4, 'seq_len': 16, 'num_kv_pairs': 5}]", "at least 4 times num_kv_pairs (5)"
    ),
    synthetic(
        "mqar",
        "train=[{'num_examples': 9999999999, 'seq_len': 16, 'num_kv_pairs': 2}]",
        "num_examples 9999999999 of seq_len 16 are over 2**36 tokens; make fewer.",
    ),
    synthetic("forgetting_mqar", "power_a=1e999", "power_a inf must be"),
    synthetic("in_context_ngram", "concentration=1e999", "concentration inf must be above 0"),
    synthetic("in_context_ngram", "order=40", "order 40 must be at least 1 and below seq_len"),
    synthetic(
        "in_context_ngram", "vocab_size=2000", "vocab_size 2000 to the power of order 2 must be at most 1048576."
    ),
    synthetic("memorization", "vocab_size=2", "vocab_size 2 must be at least 3"),
    synthetic("compression", "max_symbols=1", "num_symbols 7 must be at least 1 and at most max_symbols 1."),
    synthetic("selective_copying", "vocab_size=2", "vocab_size 2 must be at least 3"),
    synthetic("induction_heads", "train=[{'num_examples': 4, 'seq_len': 2}]", "seq_len 2 must be at least 3"),
    synthetic("state_tracking", "group=s6", "Unknown group 's6'"),
    synthetic(
        "needle", "train=[{'num_examples': 4, 'seq_len': 8, 'num_needles': 4}]", "num_needles 4 must be at least 1"
    ),
    synthetic("needle", "test=[{'num_examples': 4, 'seq_len': 8, 'depth': 2.0}]", "depth 2.0 must be from 0 to 1"),
    Call("a seed that is true", lambda _: TASKS["mqar"](preset="tiny", seed=True), "seed is True; it is an integer."),
    Call("a seed beyond 64 bits", lambda _: TASKS["text"](seed=2**64), "must be at least 0 and below 2**64."),
    Call("a seed of a text that is a float", lambda _: TASKS["text"](seed=1.0), "seed is 1.0; it is an integer."),
    Call("a length that is a float", lambda _: mqar.mqar(64, 4, 16.0, 2, 0), "seq_len is 16.0; it is an integer."),
    Call("a negative seed of examples", lambda _: needle.needle(64, 4, 16, -1), "seed -1 must be at least 0"),
    Call("no examples", lambda _: state_tracking.state_tracking("s3", 0, 8, 0), "num_examples 0 must be at least 1."),
    Call("a group that is a number", lambda _: state_tracking.state_tracking(3, 4, 8, 0), "Unknown group '3'"),
    Call("a preset that is a number", lambda _: TASKS["mqar"](preset=3), "Unknown mqar preset '3'"),
    Call("a shuffle that is a word", lambda _: TASKS["mqar"](shuffle="no"), "shuffle is 'no'; it is True or False."),
    Call("segments that are none", lambda _: TASKS["mqar"](train=[64]), "train is [64]; it is a tuple of segments."),
    Call(
        "a row beyond the batch", lambda _: own_rows(8, [7, 8]), "rows are [7, 8]; they are ascending places in a batch"
    ),
    Call(
        "rows in no order", lambda _: own_rows(8, [1, 0]), "rows are [1, 0]; they are ascending places in a batch of 8."
    ),
    Call("a batch without rows", lambda _: own_rows(0, None), "batch_size is 0; it is at least 1."),
    Call(
        "half a surrogate pair",
        lambda _: get_tokenizer("bytes").encode("a\ud800"),
        "lone surrogate, '\\ud800', at character 1",
    ),
    Call(
        "the same of GPT-2",
        lambda _: get_tokenizer("gpt2").encode("\udcff"),
        "lone surrogate, '\\udcff', at character 0",
    ),
)
