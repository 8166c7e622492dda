import pytest
from helpers.serving import LIMITS, serving, small_model


@pytest.fixture(scope="package")
def model():
    return small_model()


@pytest.fixture(scope="package")
def server(model):
    """Return a server that many tests ask; each leaves it idle."""
    with serving(model, **LIMITS) as running:
        yield running
