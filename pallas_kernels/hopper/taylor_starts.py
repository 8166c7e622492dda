"""What each piece of a sequence starts from: running sums over the sums of its parts (`taylor.sums`)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper.mosaic import TILE_ROWS
from pallas_kernels.hopper.taylor_state import SUMS_COLUMNS

BLOCK_ROWS = 8
"""Of the sums, for one block."""
PARTS_IN_FLIGHT = 8
"""Parts whose sums a block has on their way."""


def starts(added, first=None, keeps=None, *, heads: int, pieces: int, parts: int, reverse: bool = False):
    """Return the sums before each piece (B H pieces, 64, SUMS_COLUMNS), fp32.

    `added` (B H parts (pieces - 1), 64, SUMS_COLUMNS) are the sums of the parts of all pieces but the last, in the
    sequence's order; with `reverse` of all but the first, and the sums run backward. `first` (B H, 64, SUMS_COLUMNS)
    lies before all.
    Where `keeps` (B, parts (pieces - 1)), in the order of the running sums, is 0, a part forgets what lies before it.
    """
    count = parts * (pieces - 1)
    sequences = added.shape[0] // count
    given = [x for x in (first, keeps) if x is not None]
    together = max(1, PARTS_IN_FLIGHT // parts)
    layout = plgpu.Layout.WG_STRIDED((BLOCK_ROWS, SUMS_COLUMNS), vec_size=1)

    def body(added_ref, *refs):
        given_refs, out_ref = list(refs[:-1]), refs[-1]
        first_ref = None if first is None else given_refs.pop(0)
        block = lax.axis_index("block")
        sequence, rows = (
            lax.div(block, TILE_ROWS // BLOCK_ROWS),
            pl.ds(lax.rem(block, TILE_ROWS // BLOCK_ROWS) * BLOCK_ROWS, BLOCK_ROWS),
        )

        def load(ref, i):
            return mosaic.load_global(ref.at[i, rows], layout)

        def put(piece, value):
            out_ref.at[sequence * pieces + (pieces - 1 - piece if reverse else piece), rows][...] = value

        def advance(value, piece, taken: int):
            """Return the sums after some pieces, and write those before each of the pieces that follow them."""
            places = [parts * piece + i for i in range(parts * taken)]
            terms = [load(added_ref, sequence * count + (count - 1 - i if reverse else i)) for i in places]
            for i, (place, term) in enumerate(zip(places, terms, strict=True)):
                if keeps is not None:
                    value = value * given_refs[0][lax.div(sequence, heads), place]
                value = value + term
                if (i + 1) % parts == 0:
                    put(piece + (i + 1) // parts, value)
            return value

        zeros = plgpu.layout_cast(jnp.zeros((BLOCK_ROWS, SUMS_COLUMNS), jnp.float32), layout)
        value = zeros if first is None else load(first_ref, sequence)
        put(0, value)
        whole, rest = divmod(pieces - 1, together)
        value = lax.fori_loop(0, whole, lambda i, value: advance(value, i * together, together), value)
        advance(value, whole * together, rest)

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((sequences * pieces, TILE_ROWS, SUMS_COLUMNS), jnp.float32)],
        grid=(sequences * (TILE_ROWS // BLOCK_ROWS),),
        grid_names=("block",),
        kernel_name="taylor_starts",
    )(added, *given)
