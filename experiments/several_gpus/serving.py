"""The server on one GPU, over several along `tensor` or `data`, and as one replica a GPU: tokens/s of its clients.

Clients send prompts of random letters, as many at a time as there are slots, each to the replica that is next, and take
continuations as long as they may be.
"""

import argparse
import contextlib
import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from based_jax.bench import rows as bench_rows
from experiments.several_gpus import runs

OUT = "serving.jsonl"
PLACES = "one", "replicas", "data", "tensor"
ADDRESS = re.compile(r"at (http://\S+)/v1")
READY_SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    runs.add_arguments(parser, OUT)
    parser.add_argument("--workdir", required=True, help="a run on text, whose last checkpoint is served")
    parser.add_argument("--slots", type=int, default=64, help="texts that one GPU writes at once (default: 64)")
    parser.add_argument("--requests", type=int, default=256, help="for one GPU (default: 256)")
    parser.add_argument("--prompt", type=int, default=256, metavar="LETTERS", help="default: 256")
    parser.add_argument("--new-tokens", type=int, default=256, help="default: 256")
    parser.add_argument("--only", choices=PLACES, help="one of these alone")


def run(args: argparse.Namespace) -> int:
    """Serve in each way, and append a row for each."""
    folder = runs.new_folder(args.folder)
    with bench_rows.appended(args.out) as write:
        for name in PLACES if args.only is None else (args.only,):
            row = _measured(args, name, folder)
            write(row)
            print(f"{name}: {row['tokens_per_second']:.0f} tokens/s of {row['requests']} requests", flush=True)
    return 0


def _measured(args: argparse.Namespace, name: str, folder: Path) -> dict:
    """Return the row of a way to serve."""
    everywhere = list(range(args.devices))
    places = {"one": [[0]], "replicas": [[i] for i in everywhere]}.get(name, [everywhere])
    mesh = [f"--mesh={name}:{args.devices}"] if name in ("data", "tensor") else []
    rows = args.devices if name in ("replicas", "data") else 1
    slots = f"--slots={args.slots * rows // len(places)}"
    with contextlib.ExitStack() as stack:
        begun = [
            stack.enter_context(_server(args, place, [*mesh, slots], folder / f"{name}_{i}.log"))
            for i, place in enumerate(places)
        ]
        urls = [_address(process, log) for process, log in begun]
        model = json.loads(_get(f"{urls[0]}/v1/models"))["data"][0]["id"]
        clients = args.slots * rows
        _answers(args, urls, model, clients, clients, seed=1)  # what is compiled then is not timed
        begin = time.perf_counter()
        tokens = _answers(args, urls, model, clients, args.requests * rows, seed=2)
        seconds = time.perf_counter() - begin
    return {
        "how": name,
        "devices": len(places[0]) * len(places),
        "clients": args.slots * rows,
        "requests": args.requests * rows,
        "prompt_letters": args.prompt,
        "new_tokens": args.new_tokens,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": tokens / seconds,
        **runs.facts(Path(args.workdir)),
        **bench_rows.origin(),
    }


@contextlib.contextmanager
def _server(
    args: argparse.Namespace, place: Sequence[int], mesh: Sequence[str], log: Path
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Serve on the devices of a place while open."""
    words = ["serve", f"--workdir={args.workdir}", "--port=0", f"--queue={args.requests}"]
    words += [f"--max-len={2 * (args.prompt + args.new_tokens)}", f"--new-tokens={args.new_tokens}", *mesh]
    process = runs.begun(words, runs.environment(place, args.devices), log)
    try:
        yield process, log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _address(process: subprocess.Popen, log: Path) -> str:
    """Return where a server listens, once it does; RuntimeError where it ends before."""
    end = time.monotonic() + READY_SECONDS
    while not (found := ADDRESS.search(log.read_text())):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"no server: {log.read_text()[-runs.SHOWN_CHARACTERS :]}")
        time.sleep(0.2)
    return found[1]


def _answers(args: argparse.Namespace, urls: Sequence[str], model: str, clients: int, count: int, seed: int) -> int:
    """Return the tokens that were written for so many requests."""
    letters = np.random.default_rng(seed).integers(97, 123, (count, args.prompt), np.uint8)

    def answer(i: int) -> int:
        body = {"model": model, "prompt": letters[i].tobytes().decode(), "max_tokens": args.new_tokens, "seed": i}
        found = json.loads(_post(f"{urls[i % len(urls)]}/v1/completions", body))
        return found["usage"]["completion_tokens"]

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(answer, range(count)))


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def _post(url: str, body: dict) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def table(found: Sequence[dict]) -> list[dict[str, str]]:
    """Return the cells of rows."""
    return [
        {
            "how": {"one": "one GPU", "replicas": "a replica a GPU"}.get(row["how"], f"`--mesh={row['how']}`"),
            "GPUs": str(row["devices"]),
            "texts at once": str(row["clients"]),
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "device": row["device"],
        }
        for row in found
    ]
