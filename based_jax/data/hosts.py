"""How the rows of a batch are divided among the processes of a multi-host run."""

from based_jax.data.checks import check_ints
from based_jax.errors import UserError


def own_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Return the rows of a global batch that process `process_index` feeds: one of `process_count` equal blocks.

    The blocks in order of the processes make up the global batch. UserError if the batch cannot be divided.
    """
    check_ints(batch_size=batch_size, process_index=process_index, process_count=process_count)
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} must be at least 0 and below process_count {process_count}.")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} must be a positive multiple of the number of processes, {process_count}."
        )
    block = batch_size // process_count
    return slice(process_index * block, (process_index + 1) * block)
