"""What tests have sweeps measure; each run's process imports it."""

import jax
import numpy as np
from flax import nnx

from based_jax.errors import UserError


class Norms:
    """The sum of squares of a model's parameters, whatever else its config says."""

    def __init__(self, config):
        if config.seed == 13:
            raise UserError("Seed 13 is not measured.")
        self._seed, self._warmed = config.seed, None

    def facts(self):
        """Return the seed."""
        return {"told": self._seed}

    def warm(self, model):
        """Keep what the parameters are before training."""
        self._warmed = norm(model)

    def of(self, model, metrics):
        """Return what the parameters are, and were, and what the rows of the run say; the loss is another one."""
        steps = [row["step"] for row in metrics if "loss" in row]
        return {"norm": norm(model), "warmed": self._warmed, "told_steps": steps, "loss": -1.0}


def norm(model):
    """Return the sum of squares of a model's parameters."""
    return float(
        sum(np.sum(np.square(x, dtype=np.float64)) for x in map(np.asarray, jax.tree.leaves(nnx.state(model))))
    )
