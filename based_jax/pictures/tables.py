"""Tables in markdown."""

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """Return a table of text with its columns' names as the head and "-" where a cell is missing."""
    lines = [table.columns, *table.astype(object).fillna("-").to_numpy()]
    head, *rest = (f"| {' | '.join(map(str, cells))} |" for cells in lines)
    return "\n".join([head, "|---" * table.shape[1] + "|", *rest])
