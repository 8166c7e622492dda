"""The guide: built strictly, whole, shown by a browser, and true of commands, programs, messages, files and numbers."""

import ast
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from helpers import site as sites
from helpers.browser import launched, needs_browser

from based_jax import config as configs
from based_jax.__main__ import command_line
from based_jax.commands.train import parse_overrides
from based_jax.nn.mixers import kind_of
from based_jax.sweep import Sweep
from based_jax.train.run import build_config
from docs.hooks import site as site_hooks

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md")}
BLOCKS = [
    (name, *block) for name, text in PAGES.items() for block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
]
PHONE, DESK = 390, 1280
LEAST_LETTERS = 12
"""Of a sentence without what is filled in; with fewer it would be any."""
FAULTS = """() => ({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  missing: [...document.images].filter((x) => !(x.complete && x.naturalWidth)).map((x) => x.src),
})"""
"""Returns by how much a page is wider than its window, and the pictures that it does not show."""


@pytest.fixture(scope="module")
def site(tmp_path_factory, worker_id):
    """Return the folder of the guide, which is built once for all processes of the suite."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "guide"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            half = folder.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(half), strict=True))  # a warning ends it
            half.rename(folder)
    return folder


def blocks(language):
    return [(page, text) for page, kind, text in BLOCKS if kind == language]


def test_no_link_picture_or_anchor_is_missing_and_nothing_is_loaded_from_elsewhere(site):
    found = sites.pages(site)
    assert len(found) > 35
    assert not sites.broken(found)
    numbers = (site / "numbers" / "kernels" / "index.html").read_text("utf-8")
    assert "{{" not in numbers and numbers.count("<table>") >= 7


def test_what_is_broken_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#there">b</a><a href="#here">a</a>')
    (tmp_path / "b.html").write_text(
        '<img src="c.png"><script src="https://x.org/y.js"></script><a href="//x.org">x</a>'
    )
    told = "\n".join(sites.broken(sites.pages(tmp_path)))
    assert told.count("\n") == 2
    assert "b.html#there, an anchor" in told and "names c.png" in told and "loads https://x.org/y.js" in told


def shown(browser, address, width):
    """Open a page; return it, and what it complains about: console, requests, pictures, and its width."""
    view = browser.new_page(viewport={"width": width, "height": 900})
    wrong = []
    view.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    view.on("pageerror", lambda error: wrong.append(str(error)))
    host = "/".join(address.split("/")[:3])
    view.on("request", lambda request: None if request.url.startswith((host, "data:")) else wrong.append(request.url))
    view.on("response", lambda response: wrong.append(response.url) if response.status >= 400 else None)
    view.goto(address, wait_until="networkidle")
    faults = view.evaluate(FAULTS)
    return view, [*wrong, *faults["missing"], *([f"{faults['wide']} too wide"] if faults["wide"] > 0 else [])]


def results_of(view, width, words):
    """Return the pages that the search finds."""
    if width == PHONE:
        view.click("label.md-header__button[for=__search]")
        view.wait_for_timeout(300)  # it slides in
    view.locator("input.md-search__input").press_sequentially(words)
    view.wait_for_selector(".md-search-result__item a")
    return view.eval_on_selector_all(".md-search-result__item a", "links => links.map((x) => x.href)")


@needs_browser
@pytest.mark.parametrize(
    "page, width, words, place", [("", PHONE, "taylor", "/"), ("numbers/recall/", DESK, "MQAR", "/")]
)
def test_a_page_is_shown_and_the_search_works(site, page, width, words, place):
    with sites.served(site) as address, launched() as browser:
        view, wrong = shown(browser, f"{address}/{page}", width)
        assert not wrong
        assert results_of(view, width, words)


@pytest.mark.long
@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_page_is_shown(site, width):
    with sites.served(site) as address, launched() as browser:
        for path in sites.pages(site):
            view, wrong = shown(browser, f"{address}/{path.relative_to(site.resolve())}", width)
            assert not wrong, path
            view.close()


COMMANDS = [(page, line) for page, text in blocks("") for line in text.splitlines()]


@pytest.mark.parametrize("page, line", COMMANDS, ids=lambda x: x[:60])
def test_a_command_is_one(page, line):
    words = shlex.split(line.removeprefix("srun "))
    if words[:3] == ["python", "-m", "based_jax"]:
        args, overrides = command_line().parse_known_args(words[3:])
        assert not overrides or getattr(args, "takes_overrides", False), overrides
        for spec in [args.config] if isinstance(getattr(args, "config", None), str) else getattr(args, "config", []):
            build_config(configs.load(str(ROOT / spec), parse_overrides(overrides)))
        if getattr(args, "sweep", None):
            assert (ROOT / args.sweep.partition(":")[0]).exists()
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / words[3]).exists()
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / words[2].replace(".", "/") / "__main__.py").exists()
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[:2] == ["pip", "install"]:
        extra = re.fullmatch(r"\.\[(\w+)\]", words[3])[1]
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    else:
        assert line == ". .venv/bin/activate"


@pytest.mark.parametrize("page, text", blocks("python"), ids=lambda x: x[:40])
def test_a_program_runs(page, text):
    names = {}
    exec(text, names)
    if "get_sweep" in names:
        assert isinstance(names["get_sweep"](), Sweep) and len(names["get_sweep"]().trials()) == 8


def test_the_mixer_of_the_guide_is_one_with_the_imports_that_it_names():
    skeleton = (ROOT / "based_jax" / "newcomer" / "assets" / "mixer.py.txt").read_text("utf-8")
    imports = "\n".join(line for line in skeleton.splitlines() if line.startswith(("import ", "from ")))
    names, page = {"__name__": "guide"}, PAGES["how_to/add_a_mixer.md"]
    own = re.search(r"```python\n(from based_jax.errors .*?)```\n\n\{\{ readme (class Ema) \}\}", page, re.DOTALL)
    program = site_hooks.filled("readme", own[2], "a page").removeprefix("```python\n").removesuffix("```")
    exec(f"{imports}\n{own[1]}\n{program}", names)
    assert kind_of(names["Ema"]).startswith("Ema@")
    [table] = re.findall(r"^\| from \| what \|\n.*?\n\n", page, re.MULTILINE | re.DOTALL)
    cells = " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    blocks = re.findall(r"`(\w+)\.(\w+)[(`]", cells)
    assert len(blocks) > 5 and not [found for found in blocks if not callable(getattr(names[found[0]], found[1], None))]


def test_a_word_of_a_command_is_broken_nowhere():
    html = '<p>a--b</p><code class="x--y">python --config.steps=1 -k <span id="a--b">--out</span></code>'
    shown = site_hooks.on_page_content(html, None, None, None)
    words = ('<span class="word">--config.steps=1</span>', '<span class="word">--out</span>')
    assert [shown.count(word) for word in words] == [1, 1] and shown.count('class="word"') == 2
    assert re.sub(r'<span class="word">(.*?)</span>', r"\1", shown) == html


def templates():
    """Return what the sentences of the package match: an f-string with anything in its places."""
    found = set()
    for path in (ROOT / "based_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            written = [getattr(part, "value", None) for part in parts]
            if sum(len(re.findall("[A-Za-z]", text)) for text in written if isinstance(text, str)) >= LEAST_LETTERS:
                found.add("".join(re.escape(text) if isinstance(text, str) else ".+" for text in written))
    return found


def test_every_message_is_one_that_the_package_says():
    patterns = [re.compile(x) for x in templates()]
    messages = [text.strip() for page, text in blocks("text") if page == "troubleshooting.md"]
    assert len(messages) > 20

    def is_said(message):
        sentence = message.removeprefix("Error: ")
        return any(x.fullmatch(found) for x in patterns for found in (message, sentence, sentence.rstrip(".")))

    assert not [message for message in messages if not is_said(message)]
    assert not is_said("Error: Nobody has ever said this sentence of twelve letters and more.")


def test_no_number_of_the_numbers_pages_is_typed():
    for name, text in PAGES.items():
        if name.startswith("numbers/"):
            left = re.sub(r"\{\{.*?\}\}|\{ .*? \}|\]\(.*?\)|`.*?`", "", text)
            assert not re.search(r"(?<![A-Za-z\d])\d", left), name


def test_the_map_of_the_house_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| an? .*", text, re.MULTILINE)
    paths = [path for row in rows for path in re.findall(r"`([\w./]+(?:/|\.py|\.md|\.yml))`", row)]
    assert len(rows) > 10 and len(paths) > 40
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_guide_names_the_notebooks_that_there_are():
    named = re.findall(r"^\| `(\w+)` \|", PAGES["how_to/notebooks.md"], re.MULTILINE)
    assert len(named) == 6 and all((ROOT / "experiments" / "notebooks" / f"{name}.py").exists() for name in named)


def test_the_templates_of_issues_are_forms():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.stem != "config":
            ids = [part["id"] for part in form["body"]]
            assert form["name"] and form["description"] and len(set(ids)) == len(ids) > 0


def test_the_changelog_has_this_version():
    from based_jax import __version__

    assert re.search(rf"^## .*\b{re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
