"""data.json in a workdir: which text a run learns from, so that it does not go on with another."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from based_jax.errors import UserError
from based_jax.folders import read_file, reason, write_whole
from based_jax.train.tasks import Source

DATA_FILE = "data.json"
MAX_FILES_SHOWN = 3


def check_same(source: Source, workdir: Path) -> None:
    """Check that a workdir is new, or that its run read what `source` reads, wherever it lies by now.

    Raises:
      UserError: the text has changed, or data.json is damaged.
    """
    if change := changed_since(source, workdir):
        raise UserError(f"{change}; bring the text back, or choose another workdir.")


def changed_since(source: Source, workdir: Path) -> str | None:
    """Return how a run's text has changed since it was recorded, as the beginning of a sentence, or None."""
    old, new = _read(Path(workdir) / DATA_FILE), source.record
    if old.get("fingerprint", new.get("fingerprint")) == new.get("fingerprint"):
        return None
    files = _differences(old.get("files", {}), new.get("files", {}))
    what = files or "the same files are split or tokenised otherwise"
    return f"The text at '{new.get('path')}' is not what the run in '{workdir}' began with: {what}"


def save(source: Source, workdir: Path) -> None:
    """Write data.json, whole or not at all; a source that the config determines has none."""
    if source.record:
        write_whole(Path(workdir) / DATA_FILE, json.dumps(source.record, indent=2) + "\n")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record = dict(json.loads(read_file(path).decode()))
        return record | {"fingerprint": record["fingerprint"], "files": dict(record.get("files", {}))}
    except FileNotFoundError:
        return {}  # of a new run, or of one that is older than this file
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        why = reason(error) if isinstance(error, OSError) else type(error).__name__
        raise UserError(f"'{path}' is damaged ({why}); remove it if the text is as it was.") from None


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    words = [f"{name} is gone" for name in old if name not in new]
    words += [f"{name} is new" for name in new if name not in old]
    words += [f"{name} has changed" for name in new if old.get(name, new[name]) != new[name]]
    more = f" and {len(words) - MAX_FILES_SHOWN} more" if len(words) > MAX_FILES_SHOWN else ""
    return ", ".join(words[:MAX_FILES_SHOWN]) + more
