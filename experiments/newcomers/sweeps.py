"""The small sweep of the package's mixers, among which `python -m based_jax frontier` draws a new one.

python -m based_jax sweep run experiments/newcomers/sweeps.py --store=runs/newcomers
"""

from based_jax.newcomer.small_sweep import committed_sweep


def get_sweep():
    """Return the sweep."""
    return committed_sweep()
