"""Tables in markdown."""

import re
from collections.abc import Mapping

import pandas as pd

PLACE = re.compile(r"(<!-- (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""Of a table in a page."""


def markdown(table: pd.DataFrame) -> str:
    """Return a table of text with its columns' names as the head and "-" where a cell is missing."""
    lines = [table.columns, *table.astype(object).fillna("-").to_numpy()]
    head, *rest = (f"| {' | '.join(map(str, cells))} |" for cells in lines)
    return "\n".join([head, "|---" * table.shape[1] + "|", *rest])


def filled(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with its tables, each between the comments `name` and `end`, made anew."""
    return PLACE.sub(lambda found: f"{found[1]}{tables[found['name']]}\n{found[3]}", page)
