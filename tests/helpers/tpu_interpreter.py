"""Pallas' interpreter for TPU kernels: memory that nothing has written is NaN, and races fail."""

import contextlib
from collections.abc import Iterator

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

PARAMETERS = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run kernels in it, one at least."""
    pltpu.reset_tpu_interpret_mode_state()
    try:
        with pltpu.force_tpu_interpret_mode(PARAMETERS):
            yield
        assert interpreter.races is not None, "no kernel was interpreted"
        assert not interpreter.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
