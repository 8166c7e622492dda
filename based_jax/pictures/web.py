"""Pages that hold all that they need: style, scripts and data stand in the file, and nothing is fetched."""

import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from based_jax.folders import local_path, make_folder, writing

ASSETS = Path(__file__).parent / "assets"
SHARED_SCRIPTS = ("figures.js", "scales.js", "chart.js", "table.js")


def write(path: str | os.PathLike, template: str, *, title: str, data: Any, styles: Sequence[str], script: str) -> Path:
    """Write a page and return its path.

    Args:
      path: of the HTML file.
      template: of `ASSETS`; {{title}}, {{style}}, {{data}} and {{script}} stand for what follows.
      title: its heading.
      data: what JSON can hold.
      styles, script: files of `ASSETS`; the script comes after `SHARED_SCRIPTS`.

    Raises:
      UserError: the file cannot be written.
    """
    parts = {
        "title": html.escape(title),
        "style": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in styles),
        "script": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in (*SHARED_SCRIPTS, script)),
        "data": embedded(data),
    }
    # In one pass: braces in a title or in the data are text.
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (ASSETS / template).read_text(encoding="utf-8"))
    file = local_path(path, "path")
    make_folder(file.parent)
    with writing(file):
        file.write_text(text, encoding="utf-8", errors="backslashreplace")  # a title may be no UTF-8
    return file


def embedded(value: Any) -> str:
    """Return JSON that can stand inside a script element: no string of it can close the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
