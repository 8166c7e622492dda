"""Pages have the tables of the rows beside them."""

import pytest

from based_jax.pictures.tables import filled
from experiments.linearize import pages as linearize
from experiments.pods import __main__ as pods
from experiments.tpu import __main__ as tpu

PAGES = {
    "linearize": (linearize.README, linearize.tables),
    "pods": (pods.README, lambda: {name: table() for name, table in pods.TABLES.items()}),
    "tpu": (tpu.README, lambda: {name: table() for name, table in tpu.TABLES.items()}),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_the_tables_of_its_rows(name):
    readme, tables = PAGES[name]
    page, made = readme.read_text("utf-8"), tables()
    assert all(f"<!-- {table} -->\n" in page for table in made)
    assert filled(page, made) == page
