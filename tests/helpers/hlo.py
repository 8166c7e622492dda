"""What a compiled program does on each device, as tests ask for it."""

from typing import NamedTuple

from based_jax.aot import collectives, costs, hlo


class Exchange(NamedTuple):
    """An array that a collective operation returns on each device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]


class Program(hlo.Program):
    """The text of a compiled program (`jax.stages.Compiled.as_text()`)."""

    def flops(self) -> float:
        """Return the FLOPs of all matrix products of one device."""
        return costs.flops(self)

    def carried(self) -> list[tuple[int, ...]]:
        """Return the shapes of the arrays that loops carry on one device."""
        return [shape for x in self.instructions if x.kind == "while" for shape in x.shapes if shape]

    def exchanged(self, sizes, axis: int) -> list[Exchange]:
        """Return the arrays of each exchange between devices that differ in one axis, by its place, of a mesh."""
        between = [x for x in collectives.collectives(self) if axis in x.axes(sizes)]
        return [Exchange(x.kind, array.dtype, array.shape) for x in between for array in x.results]
