"""What MkDocs calls while it builds the guide: pictures and pages from elsewhere in the repository, and numbers.

A page writes `{{ table NAME }}`, a table of `tables.TABLES`, and `{{ readme TEXT }}`, the README's program that has
this text. Neither is typed: what the rows no longer say, the guide no longer says.
"""

import os
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs loads this file alone, and its command has no folder on the path

from docs.hooks.tables import TABLES  # noqa: E402

PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Of the guide, and the files of the repository that they are."""
PICTURES = ("experiments/*/results/*.png", "experiments/*/results/*.html")
CODE = re.compile(r"<code.*?</code>", re.DOTALL)
TAG_OR_WORD = re.compile(r"(?P<tag><[^>]*>)|[^\s<>]*--[^\s<>]+")
PLACE = re.compile(r"\{\{ (table|readme) (.+?) \}\}")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let a page choose between versions where `mike` builds them; alone there is nothing to choose from."""
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike"}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the committed pictures as pictures/EXPERIMENT/NAME, and pages that stand elsewhere."""
    for pattern in PICTURES:
        for path in sorted(ROOT.glob(pattern)):
            name = f"pictures/{path.parents[1].name}/{path.name}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for name, source in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what a page of the guide asks for; others say how to ask."""
    if page.file.src_uri in PAGES:
        return markdown
    return PLACE.sub(lambda found: filled(found[1], found[2], page.file.src_uri), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep the words of commands whole: a browser breaks a line behind each of their hyphens."""
    return CODE.sub(lambda code: TAG_OR_WORD.sub(_kept_whole, code[0]), html)


def _kept_whole(found: re.Match) -> str:
    return found[0] if found["tag"] else f'<span class="word">{found[0]}</span>'


def filled(kind: str, name: str, page: str) -> str:
    """Return a table, or a program of the README.

    Raises:
      PluginError: there is none, which ends the build.
    """
    if kind == "table":
        if name not in TABLES:
            raise PluginError(f"{page} asks for the table '{name}', which is none of {', '.join(TABLES)}.")
        return TABLES[name]()
    readme = (ROOT / "README.md").read_text("utf-8")
    found = [text for text in re.findall(r"```python\n.*?```", readme, re.DOTALL) if name in text]
    if len(found) != 1:
        raise PluginError(f"{page} asks for the README's program with '{name}', of which there are {len(found)}.")
    return found[0]
