"""The guide as it is built: its pages' links, what they load, and a server of its files."""

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}
"""Tags and attributes that a browser fetches without being asked."""


class Page(HTMLParser):
    """What a page has: its anchors, the addresses that it links to, and those that it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.anchors, self.links, self.loads = path, set(), [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        """Take what one tag has."""
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        for name in ("src", "href"):
            if found.get(name) is not None:
                (self.loads if (tag, name) in LOADED else self.links).append(found[name])

    def target(self, address: str) -> tuple[Path, str]:
        """Return the file and the anchor that an address of this site means."""
        place, anchor = urldefrag(address)
        path = self.path if not place else (self.path.parent / unquote(urlsplit(place).path)).resolve()
        return (path / "index.html" if path.is_dir() else path), anchor


def pages(site: Path) -> dict[Path, Page]:
    """Return the pages of a site by their files; that of what is not found stands at no place of its own."""
    return {path: Page(path) for path in sorted(site.resolve().rglob("*.html")) if path.name != "404.html"}


def broken(found: dict[Path, Page]) -> list[str]:
    """Return every link, picture, script and anchor that is not there, and what is loaded from another host."""
    wrong = []
    for path, page in found.items():
        for address in page.loads + page.links:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https") or address.startswith("//"):
                wrong += [f"{path} loads {address}"] if address in page.loads else []
                continue
            if parts.scheme:
                continue
            file, anchor = page.target(address)
            if not file.exists():
                wrong.append(f"{path} names {address}")
            elif anchor and file in found and anchor not in found[file].anchors:
                wrong.append(f"{path} names {address}, an anchor that is not there")
    return wrong


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Print nothing."""


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """Yield the address of a folder's files, as long as they are served."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
