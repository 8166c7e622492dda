# Two commands from a clean checkout: `make demo` and `make test`. Each creates .venv from requirements.lock first.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
JOBS ?= 2
TPU_TESTS := tests/ops/tpu tests/aot/test_aot.py tests/bench/test_static.py tests/experiments/test_tpu.py

# Whatever the environment says, bytecode is kept, under .venv: the suite starts Python dozens of times, and what it
# imports takes longer to compile than to run.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode

.PHONY: demo test test-all test-tpu lint types unit unit-all docs docs-version release-check lock clean

demo: $(VENV)/installed
	$(BIN)/python -m experiments.demo --workdir=demo_out

# mypy, which takes one core for a minute, runs beside the tests.
test: lint
	$(MAKE) --no-print-directory --jobs=2 types unit

test-all: lint
	$(MAKE) --no-print-directory --jobs=2 types unit-all

# What compiles for TPUs that are not here, by libtpu: without it these tests are skipped.
test-tpu: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[tpu]'
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -rs $(TPU_TESTS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

unit: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not long"

unit-all: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The guide, in site/: open site/index.html by `$(BIN)/python -m mkdocs serve`, since a search asks for a server.
docs: $(VENV)/installed
	$(BIN)/python -m mkdocs build --strict

# Maintainers: the guide of this version beside those before it, on the branch gh-pages; `latest` is what opens.
docs-version: $(VENV)/installed
	PATH=$$PWD/$(BIN):$$PATH mike deploy --update-aliases "$$($(BIN)/python -c 'import based_jax; print(based_jax.__version__)')" latest
	PATH=$$PWD/$(BIN):$$PATH mike set-default latest

# Before a release: the wheel, alone, on the newest versions that it allows.
release-check: $(VENV)/installed
	sh .ci/release_check

$(VENV)/installed: $(LOCK) pyproject.toml
	@python=$$(sh ./.ci/find_python) && echo "Creating $(VENV) with $$python" && "$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Maintainers: resolve the lock again, jax held at the version that every number in the repository was made with.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.12 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --constraint .ci/constraints.txt --upgrade -o $(LOCK)

clean:
	rm -rf $(VENV) demo_out .pytest_cache .ruff_cache .mypy_cache
