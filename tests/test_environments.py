import json
import os
import subprocess
import sys

import pytest
from helpers import environments

NAMES = (*environments.OTHERS, "XLA_FLAGS")


def told():
    """Return what a process that is started here is told."""
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    return json.loads(subprocess.check_output([sys.executable, "-S", "-c", code]))


def test_processes_are_told_what_the_suite_is():
    assert {name: told().get(name) for name in NAMES} == {name: os.environ[name] for name in NAMES}
    assert environments.XLA_FLAGS in told()["XLA_FLAGS"]


@pytest.mark.usefixtures("as_a_user")
def test_those_of_a_user_are_not():
    assert not told().keys() & environments.OTHERS.keys() and environments.XLA_FLAGS not in told()["XLA_FLAGS"]
