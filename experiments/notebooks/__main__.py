"""Execute the notebooks, and write each beside its .py with its outputs.

python -m experiments.notebooks                 # all of them
python -m experiments.notebooks quickstart      # one
"""

import argparse
import sys
import time

from based_jax.errors import installs

try:
    import nbformat

    from experiments.notebooks import executing
except ImportError as error:
    sys.exit(f"Error: {error.name} is not installed; {installs('notebooks')} brings it.")


def main() -> None:
    """Execute the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(executing.NAMES)} (default: all)")
    names = parser.parse_args().names or executing.NAMES
    if unknown := [name for name in names if name not in executing.NAMES]:
        parser.error(f"there is no notebook '{unknown[0]}'; there are {', '.join(executing.NAMES)}")
    for name in names:
        begin, notebook = time.perf_counter(), executing.read(name)
        executing.execute(notebook)
        nbformat.write(notebook, executing.FOLDER / f"{name}.ipynb")
        print(f"{name}.ipynb: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
