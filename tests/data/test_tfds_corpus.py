"""Datasets of tensorflow-datasets as corpora, on small ones that are built here, without TensorFlow."""

import sys
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from based_jax import config
from based_jax.data.tfds_corpus import TfdsCorpus, quiet_tfds
from based_jax.errors import UserError
from based_jax.train.tasks import TASKS, TextTask
from tests.helpers import texts

SPLITS = {
    "train": [f"Saying {i}: " + "äbc " * (i % 5 + 1) for i in range(30)],
    "validation": ["Held out.", "  ", "Held out too."],
    "test": ["Never seen."],
}
TEXT = tfds.features.Text()


class Sayings(tfds.core.GeneratorBasedBuilder):
    """A dataset with these splits; a document stands in each of these features, with its name where it is not text."""

    VERSION = tfds.core.Version("1.0.0")
    splits, texts = SPLITS, ("text",)

    def _info(self):
        features = dict.fromkeys(self.texts, TEXT) | {"number": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(documents) for split, documents in self.splits.items()}

    def document(self, name, document):
        return document if name == "text" else f"{document} as {name}"

    def _generate_examples(self, documents):
        for number, document in enumerate(documents):
            yield number, {"number": number} | {name: self.document(name, document) for name in self.texts}


class TwoTexts(Sayings):
    VERSION = tfds.core.Version("1.0.0")
    texts = ("text_long", "text_short")


class TrainAlone(Sayings):
    VERSION = tfds.core.Version("1.0.0")
    splits: ClassVar = {"train": SPLITS["train"]}
    texts = ("content",)


class OnlyTest(Sayings):
    VERSION = tfds.core.Version("1.0.0")
    splits: ClassVar = {"test": SPLITS["test"]}


class NoText(Sayings):
    VERSION = tfds.core.Version("1.0.0")
    texts = ()


class NeverPrepared(Sayings):
    VERSION = tfds.core.Version("1.0.0")


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Return a function that writes a dataset into the folder of prepared ones."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))

    def write(builder, file_format="array_record"):
        with quiet_tfds():
            builder(data_dir=tmp_path / "prepared", file_format=file_format).download_and_prepare()
        return builder.name

    return write


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_documents_of_the_splits(prepare, file_format):
    corpus = TfdsCorpus(prepare(Sayings, file_format))
    documents = texts.documents(corpus)
    assert sorted(documents["train"]) == sorted(SPLITS["train"])
    assert sorted(documents["validation"]) == ["Held out too.", "Held out."]
    assert "tensorflow" not in sys.modules


def test_without_a_validation_split_documents_are_held_out(prepare):
    documents = texts.documents(TfdsCorpus(prepare(TrainAlone)))
    assert sorted(documents["train"] + documents["validation"]) == sorted(
        f"{document} as content" for document in SPLITS["train"]
    )
    assert documents["validation"]


def test_the_text_feature_is_chosen(prepare):
    name = prepare(TwoTexts)
    short, long = TfdsCorpus(name, "text_short"), TfdsCorpus(name, "text_long")
    assert "Held out. as text_short" in texts.documents(short)["validation"]
    assert "Held out. as text_long" in texts.documents(long)["validation"]
    assert short.file_hashes() != long.file_hashes()


def test_a_task_reads_it_and_packs_it_once(prepare, tmp_path):
    values = {"kind": "text", "path": f"tfds:{prepare(Sayings)}", "tokenizer": "bytes", "seq_len": 16}
    task = TextTask(**values, cache_dir=str(tmp_path / "cache"))
    source, again = task.open(4), task.open(4)
    np.testing.assert_array_equal(source.batch(3)["inputs"], again.batch(3)["inputs"])
    rows = np.concatenate([batch["inputs"] for batch in source.eval_batches("validation")])
    assert bytes(rows[rows > 0].astype(np.uint8)).count(b"Held out") == 2
    assert len(list((tmp_path / "cache").rglob("index.json"))) == 1


def test_another_version_of_the_data_is_another_dataset(prepare, tmp_path):
    name = prepare(Sayings)
    before = TfdsCorpus(name).file_hashes()
    assert TfdsCorpus(name).file_hashes() == before
    (record,) = (tmp_path / "prepared").rglob("*test.array_record*")
    record.write_bytes(record.read_bytes() + b"more")
    assert TfdsCorpus(name).file_hashes() != before


def refusal(name, text_feature=None):
    with pytest.raises(UserError) as error:
        texts.documents(TfdsCorpus(name, text_feature))
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    return message


def test_what_cannot_be_read_is_named(prepare, tmp_path, capfd):
    folder = tmp_path / "prepared"
    assert (
        refusal("sayingz") == f"Dataset 'sayingz' is none of tfds.list_builders(), and is not prepared in '{folder}'."
    )
    assert refusal("never_prepared").startswith(
        f"Dataset 'never_prepared' is not prepared in '{folder}' as array_record or parquet; tfds.builder("
    )
    assert refusal("sayings:9.9.9").startswith(f"Dataset 'sayings:9.9.9' in '{folder}' cannot be read: ")
    assert refusal(prepare(NoText)) == "Dataset 'no_text' has no text feature; it has number."
    assert refusal(prepare(OnlyTest)) == "Dataset 'only_test' has no split 'train'; it has test."
    assert refusal(prepare(TwoTexts)) == (
        "text_feature is None, but dataset 'two_texts' has several: text_long, text_short."
    )
    assert refusal("two_texts", "text_shrt").startswith("Unknown text feature of dataset 'two_texts' 'text_shrt': did")
    assert refusal("two_texts", "number").endswith("Allowed: text_long, text_short.")
    (record,) = folder.rglob("*two_texts-train.array_record*")
    record.write_bytes(record.read_bytes()[:-200])
    assert refusal("two_texts", "text_long").startswith(f"Dataset 'two_texts' in '{folder}' cannot be read: ")
    assert capfd.readouterr() == ("", "")


def test_a_config_names_it():
    task = config.build(TASKS["text"], {"kind": "text", "path": "tfds:pg19", "text_feature": "book_text"})
    assert (task.path, task.text_feature) == ("tfds:pg19", "book_text")
