"""Tables in markdown."""

import pandas as pd

from based_jax.pictures.tables import markdown


def test_a_table_has_a_head_and_says_what_is_missing():
    table = pd.DataFrame({"mixer": ["Based", "GLA"], "8 KiB": [None, "0.5"], 16: [float("nan")] * 2})
    assert markdown(table).splitlines() == [
        "| mixer | 8 KiB | 16 |",
        "|---|---|---|",
        "| Based | - | - |",
        "| GLA | 0.5 | - |",
    ]
