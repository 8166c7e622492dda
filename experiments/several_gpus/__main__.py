"""What several GPUs of one host do together: python -m experiments.several_gpus --help."""

import sys

from experiments import commands
from experiments.several_gpus import layouts, processes, serving, sweeping, table

MODULES = {
    "layouts": layouts,
    "processes": processes,
    "sweep": sweeping,
    "serve": serving,
    "table": table,
}

if __name__ == "__main__":
    sys.exit(commands.run_module("several_gpus", __doc__, MODULES, None))
