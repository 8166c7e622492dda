"""Training; the package itself can be called, as `loop.train`: `from based_jax import train, load_config`.

A package and a function cannot both be the name `train` of `based_jax`, and which of them it was would depend on what
has been imported before.
"""

import os
import sys
import types
import typing

if typing.TYPE_CHECKING:
    from based_jax.train.run import TrainConfig


class _Train(types.ModuleType):
    def __call__(self, config: "TrainConfig", workdir: str | os.PathLike) -> dict[str, float]:
        """Train a run and return its final evaluation; see `based_jax.train.loop.train`."""
        from based_jax.train import loop

        return loop.train(config, workdir)


sys.modules[__name__].__class__ = _Train
