"""GPUs and TPUs that are not there: what is traced under them is lowered for them."""

from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

H100 = "NVIDIA H100 80GB HBM3"
TPU_V5E = "TPU v5 lite"


def gpus(kind: str = H100, shape: tuple[int, ...] = (1,), axes: AxisType = AxisType.Auto, names=("data", "heads")):
    """Return a context in which JAX compiles for a mesh of such GPUs."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return use_abstract_mesh(AbstractMesh(shape, names[: len(shape)], (axes,) * len(shape), abstract_device=device))


def tpus(shape: tuple[int, ...] = (1,), names=("data", "tensor"), kind: str = TPU_V5E):
    """Return a context in which JAX compiles for a mesh of such TPUs."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    axes = (AxisType.Auto,) * len(shape)
    return use_abstract_mesh(AbstractMesh(shape, names[: len(shape)], axes, abstract_device=device))
