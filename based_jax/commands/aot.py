"""Compile a config for devices that are not here: what a step needs there, and an estimate of its time.

It runs on a CPU; the compiler of TPUs comes with pip install -e '.[tpu]', that of GPUs with '.[gpu]'. What
does not fit, and what a compiler would copy whole to all devices, ends in exit code 2.

examples:
  python -m based_jax aot --config=configs/based.py:1b --topology=v5p:8x8x8 --mesh=data:8,fsdp:64 --rows-per-device=8
  python -m based_jax aot --config=configs/based.py:1b --topology=v5p:8x8x8 --slices=2 --mesh=fsdp:64 --out=rows.jsonl
  python -m based_jax aot --config=configs/based.py:360m --topology=h100:4x8 --program=decode
"""

import argparse
import contextlib
import dataclasses
from pathlib import Path

from based_jax.commands.parser import CommandParser, out_file
from based_jax.commands.train import parse_overrides
from based_jax.errors import UserError

PROGRAMS = ("train", "decode")


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments; `--config.a.b=value` overrides are taken beside them."""
    parser.add_argument("--config", required=True, help="config file, optionally with a variant: configs/x.py:variant")
    parser.add_argument(
        "--topology",
        required=True,
        help="v4, v5e, v5p, v6e or v7x with a slice, v5p:8x8x8; h100 or h200 with hosts x GPUs",
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="such slices, of TPUs (default: 1)")
    parser.add_argument("--mesh", default="", help="devices of its axes, data:8,fsdp:64 (default: the config's)")
    parser.add_argument(
        "--rows-per-device", type=int, metavar="N", help="in one microbatch, in place of the config's batch"
    )
    parser.add_argument("--program", choices=PROGRAMS, action="append", help="may be given twice (default: both)")
    parser.add_argument("--whole-rows", action="store_true", help="train on a document a row, without ids of documents")
    parser.add_argument(
        "--without-kernels", action="store_true", help="leave to XLA what `auto` would take kernels for: to compare"
    )
    parser.add_argument("--text", type=Path, metavar="DIR", help="write the text of each compiled program there")
    parser.add_argument("--out", type=out_file, help="append a JSON row of each program to this file")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    """Print what each program needs and takes, and append it; raise what is wrong with one."""
    from based_jax import config as configs
    from based_jax import parallel
    from based_jax.aot import compiling, programs, report, topology
    from based_jax.bench import rows
    from based_jax.folders import make_folder, writing
    from based_jax.ops.dispatch import without_kernels
    from based_jax.train.run import build_config

    config = build_config(configs.load(args.config, parse_overrides(args.overrides)))
    if args.rows_per_device is not None:
        config = dataclasses.replace(config, rows_per_device=args.rows_per_device, microbatches=1)
    sizes = parse_mesh(args.mesh) or config.mesh
    devices = topology.device_count(args.topology, args.slices)
    programs.check(config, parallel.abstract_mesh(sizes, devices, args.slices))
    if args.text is not None:
        make_folder(args.text)
    found = topology.find(args.topology, args.slices)
    mesh = parallel.make_mesh(sizes, found.devices)
    with rows.appended(args.out) as write:
        for name in args.program or PROGRAMS:
            options = {"packed": False} if name == "train" and args.whole_rows else {}
            with without_kernels() if args.without_kernels else contextlib.nullcontext():
                lowered = programs.PROGRAMS[name](config, mesh, **options)
            compiled = compiling.compiled(lowered.lowered)
            if args.text is not None:
                with writing(file := args.text / f"{name}.txt"):
                    file.write_text(compiled.text)
            told = report.report(compiled, lowered, found, mesh, config.model.dtype)
            print(report.table(f"{args.config} {name}", told), flush=True)
            write({"config": args.config, "program": name, **told.row(), **rows.origin()})
            told.check()


def parse_mesh(text: str) -> dict[str, int]:
    """Return the devices by axis of "data:8,fsdp:64".

    Raises:
      UserError: it is something else.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, colon, size = part.partition(":")
        if not colon or not size.isdecimal() or axis in sizes:
            raise UserError(f"Mesh '{text}' is none: it gives each axis its devices once, as data:8,fsdp:64 does.")
        sizes[axis] = int(size)
    return sizes
