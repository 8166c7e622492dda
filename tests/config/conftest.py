"""What tests of configs share."""

import pytest
from helpers.configs import FILE


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(FILE)
    return str(path)
