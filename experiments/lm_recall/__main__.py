"""Small language models with equal states on real text: prepare, run, table, plot."""

import sys

from experiments import commands
from experiments.lm_recall import plot, prepare, run, table

if __name__ == "__main__":
    sys.exit(commands.run_module("lm_recall", __doc__, {"prepare": prepare, "run": run, "table": table, "plot": plot}, None))
