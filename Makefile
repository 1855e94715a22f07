# make run: start the service. make test: run its tests. Both install what they need into .venv first.

PYTHON ?= python3
BIN = .venv/bin
SOURCES = $(wildcard *.py *.sql *.md *.toml tests/*)

.PHONY: help run test quick lint check format lock clean

help:
	@echo "make run      install what is needed and serve on http://127.0.0.1:5000"
	@echo "make test     install what is needed and run all tests"
	@echo "make quick    the tests that take no time"
	@echo "make check    format, lint, types and branch coverage (98 %)"
	@echo "make format   let ruff write the format"
	@echo "make lock     pin the newest versions that pyproject.toml allows, with hashes (needs uv)"

run: .venv/run
	@exec $(BIN)/python authsvc.py

test: .venv/dev
	@rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest
	@$(BIN)/coverage combine -q

quick: .venv/dev
	$(BIN)/pytest -m "not slow"

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

# The coverage of the last "make test", which is run when anything is newer.
check: lint .coverage
	$(BIN)/coverage report

.coverage: $(SOURCES)
	$(MAKE) test

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade \
		pyproject.toml -o requirements.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade \
		pyproject.toml --group dev -c requirements.txt -o requirements-dev.txt

clean:
	rm -rf .venv .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "authsvc needs Python 3.11 or newer; name one: make PYTHON=python3.12 run" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "this Python has no venv: apt-get install python3-venv" >&2; exit 1; }

.venv/run: .venv/bin/python requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@
