"""There is no Triton but for Linux, and nothing here to test without it."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
