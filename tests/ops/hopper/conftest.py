"""What tests of several Hopper kernels share."""

import pytest
from helpers.interpreted import replace_products
from jax.experimental.pallas import mosaic_gpu as plgpu

from based_jax.ops.hopper import limits
from pallas_kernels.hopper import mosaic


@pytest.fixture
def interpreted_chunks(monkeypatch):
    """Run kernels in Pallas' interpreter, which looks for races.

    It takes products' reads for those of registers, and these for such as copies may overtake.
    """
    replace_products(monkeypatch)

    def reads_are_over(read):
        def run(*operands):
            found = read(*operands)
            plgpu.commit_smem()
            return found

        return run

    for name in ("multiply", "load"):
        monkeypatch.setattr(mosaic, name, reads_are_over(getattr(mosaic, name)))
    monkeypatch.setattr(mosaic, "load_global", lambda ref, layout: ref[...])
    monkeypatch.setattr(plgpu, "set_max_registers", lambda *args, **options: None)
    monkeypatch.setattr(limits, "multiprocessors", lambda: 2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
