"""Sweeps: points of a space of configs, trained as lanes of one program or as whole runs, one row each in a store.

A sweep file has a function `get_sweep(variant)` that returns a `Sweep`:

    from based_jax.sweep import Sweep, param, product

    def get_sweep(variant="small"):
        return Sweep(base={...}, points=product(param("model.d_model", [64, 128]), param("optim.lr", [1e-3, 1e-2])))
"""

from based_jax.sweep.points import Point, chain, param, product, zipped
from based_jax.sweep.trial import Sweep, Trial

__all__ = ["Point", "Sweep", "Trial", "chain", "param", "product", "zipped"]
