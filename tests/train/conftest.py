import pytest

from based_jax.train.loop import train
from tests.helpers.tiny_runs import make_config


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return the workdir of an unbroken run of the tiny config, which no test changes."""
    workdir = tmp_path_factory.mktemp("whole")
    train(make_config(), workdir)
    return workdir
