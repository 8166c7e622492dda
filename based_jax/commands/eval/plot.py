"""Compare models by the rows of `eval recall`: a table in markdown, and a picture.

examples:
  python -m based_jax eval plot --rows=runs/recall --out=runs/pictures
"""

import argparse

from based_jax.commands.parser import CommandParser


def add_arguments(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--rows", action="append", required=True, metavar="DIR", help="folder of rows; may be given several times"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of recall.md, .png, .svg and .pdf")


def run(args: argparse.Namespace) -> None:
    """Read all rows, then write the table and the picture."""
    from based_jax.evals import recall
    from based_jax.folders import local_path, make_folder, write_whole
    from based_jax.pictures import recall as pictures
    from based_jax.pictures import tables
    from based_jax.store import Store

    out = local_path(args.out, "--out")
    found = recall.summaries(row for folder in args.rows for row in recall.rows_of(Store(folder)))
    files = pictures.draw(found, out / "recall")
    make_folder(out)
    write_whole(out / "recall.md", tables.markdown(recall.table(found)) + "\n")
    print(f"Drawn: {', '.join(map(str, [out / 'recall.md', *files]))}.")
