"""A corpus from tensorflow-datasets: a dataset that was prepared before, its documents those of one text feature.

Documents of the split `validation`, or `test` where there is none, are the validation split; where there is neither,
`data/holdout.py` holds text out of `train`. TensorFlow is not needed: files are array_record or parquet.
"""

import contextlib
import dataclasses
import functools
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.constants import get_default_data_dir

from based_jax.data.corpus import TFDS_PREFIX, TextSplit, hash_file
from based_jax.data.documents import Chunk, Reading
from based_jax.errors import UserError, unknown

VALIDATION_SPLITS = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class TfdsCorpus:
    """The dataset NAME of `data.path="tfds:NAME"`, in $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Attributes:
      name: as tensorflow-datasets takes it: 'name', 'name/config' or 'name/config:version'.
      text_feature: the feature that holds a document; None where the dataset has one text feature, or one named "text".
    """

    name: str
    text_feature: str | None = None

    def __str__(self):
        return TFDS_PREFIX + self.name

    @property
    def location(self) -> str:
        """The name, and the folder of prepared datasets."""
        return f"{self} in {get_default_data_dir()}"

    @property
    def extent(self) -> int:
        """Examples of the splits that are read."""
        return sum(len(self._sources[split]) for split in ("train", self._validation) if split in self._sources)

    left_out = ()

    def file_hashes(self) -> dict[str, str]:
        """Return the sha256 of each file of the dataset, and the name of the feature.

        Raises:
          UserError: the dataset is unknown or not prepared, or has no such text feature.
        """
        with self._reading():
            files = {Path(path) for split in self._sources for path in self._info.splits[split].filepaths}
            return {path.name: hash_file(path) for path in sorted(files)} | {"text_feature": self._feature}

    def chunks(self, split: TextSplit, reading: Reading) -> Iterator[Chunk]:
        """Yield the documents of a split.

        Raises:
          UserError: as `file_hashes`, or a file is damaged, or there is nothing to train on.
        """
        if "train" not in self._sources:
            raise UserError(f"Dataset '{self.name}' has no split 'train'; it has {', '.join(self._sources)}.")
        name = self._validation if split == "validation" else split
        with self._reading():
            for example in self._sources[name] if name else ():
                reading.position += 1
                yield from reading.document(example[self._feature].decode())

    @property
    def _validation(self) -> str | None:
        """The dataset's name of the validation split."""
        return next((split for split in VALIDATION_SPLITS if split in self._sources), None)

    @functools.cached_property
    def _sources(self) -> dict[str, Any]:
        """The data source of each split."""
        with self._reading(), quiet_tfds():
            return tfds.data_source(self.name, data_dir=get_default_data_dir(), download=False)

    @property
    def _info(self) -> tfds.core.DatasetInfo:
        return next(iter(self._sources.values())).dataset_info

    @functools.cached_property
    def _feature(self) -> str:
        features = self._info.features
        texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
        if not texts:
            raise UserError(f"Dataset '{self.name}' has no text feature; it has {', '.join(features)}.")
        if self.text_feature is None and len(texts) > 1 and "text" not in texts:
            raise UserError(f"text_feature is None, but dataset '{self.name}' has several: {', '.join(texts)}.")
        feature = self.text_feature or ("text" if "text" in texts else texts[0])
        if feature not in texts:
            raise unknown(f"text feature of dataset '{self.name}'", feature, texts)
        return feature

    @contextlib.contextmanager
    def _reading(self):
        """Name the dataset in whatever tensorflow-datasets or a damaged file raises."""
        folder = get_default_data_dir()
        try:
            yield
        except UserError:
            raise
        except tfds.core.DatasetNotFoundError:
            raise UserError(
                f"Dataset '{self.name}' is none of tfds.list_builders(), and is not prepared in '{folder}'."
            ) from None
        except NotImplementedError:
            raise UserError(
                f"Dataset '{self.name}' is not prepared in '{folder}' as array_record or parquet; "
                f"tfds.builder('{self.name}', file_format='array_record').download_and_prepare() does that."
            ) from None
        except Exception as error:
            reason = str(error).partition("\n")[0][:150].rstrip(".")
            raise UserError(f"Dataset '{self.name}' in '{folder}' cannot be read: {reason}.") from error


@contextlib.contextmanager
def quiet_tfds():
    """Keep the progress bars and notices of tensorflow-datasets off the terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
