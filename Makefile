# make run: start the service. make test: run its tests. Both install what they need into .venv first.

PYTHON ?= python3
BIN = .venv/bin
SOURCES = $(wildcard *.py *.sql *.md *.toml tests/*)

# POSTGRES=1 packs psycopg with its libpq too, for AUTHSVC_DATABASE=postgresql://…: some 5 MB.
PACKED = bottle.py bcrypt waitress segno \
	$(if $(POSTGRES),psycopg psycopg_binary psycopg_binary.libs psycopg_pool typing_extensions.py)
PYZ = dist/authsvc$(if $(POSTGRES),-postgres).pyz

.PHONY: help run test quick bench pyz install lint check format lock clean

help:
	@echo "make run      install what is needed and serve on http://127.0.0.1:5000"
	@echo "make test     install what is needed and run all tests"
	@echo "make quick    the tests that take no time"
	@echo "make pyz      the service in one file, dist/authsvc.pyz, for any python3 >= 3.11 here (POSTGRES=1: with psycopg)"
	@echo "make install  that file, its units and settings into the system (as root); deploy/README.md goes on from there"
	@echo "make bench    measure it beside what people pick instead, half an hour (needs wrk, Node and npm)"
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

bench: .venv/dev
	$(BIN)/python bench/run.py --write

pyz: $(PYZ)

# Our modules lie side by side in it, and never in somebody's site-packages, where a name like auth would be taken.
$(PYZ): .venv/pyz $(wildcard *.py pages/*) $(wildcard *.sql) common.txt.gz
	@rm -rf build && mkdir -p build dist
	@cp -r $(filter-out main.py,$(wildcard *.py)) $(wildcard *.sql) common.txt.gz pages build
	@cd $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && cp -r $(PACKED) $(CURDIR)/build
	@find build -name __pycache__ -prune -exec rm -r {} +
	@$(BIN)/shiv --site-packages build --entry-point authsvc:main --python '/usr/bin/env python3' --reproducible \
		--output-file $@
	@rm -rf build
	@echo $@

# DESTDIR= another root: then nothing of this system is changed.
install: $(PYZ)
	install -D -m 644 $(PYZ) $(DESTDIR)/opt/authsvc/authsvc.pyz
	umask 022 && SHIV_ROOT=$(DESTDIR)/opt/authsvc/unpacked \
		/usr/bin/python3 -sP $(DESTDIR)/opt/authsvc/authsvc.pyz --help >/dev/null
	install -D -m 755 deploy/authsvc $(DESTDIR)/usr/local/sbin/authsvc
	install -D -m 644 -t $(DESTDIR)/etc/systemd/system $(wildcard deploy/*.service deploy/*.timer)
	$(if $(DESTDIR),,systemd-sysusers --inline 'u authsvc - "authsvc" /var/lib/authsvc')
	[ -e $(DESTDIR)/etc/authsvc/authsvc.env ] || \
		install -D -m 640 $(if $(DESTDIR),,-g authsvc) deploy/authsvc.env $(DESTDIR)/etc/authsvc/authsvc.env
	$(if $(DESTDIR),,systemctl daemon-reload)

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
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade \
		pyproject.toml --extra qr --extra postgres --group pyz -c requirements-dev.txt -o requirements-pyz.txt

clean:
	rm -rf .venv build dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "authsvc needs Python 3.11 or newer; name one: make PYTHON=python3.12 run" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "this Python has no venv: apt-get install python3-venv" >&2; exit 1; }

.venv/run: .venv/bin/python requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

.venv/pyz: .venv/run requirements-pyz.txt
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements-pyz.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@
