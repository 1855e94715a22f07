# "make run" starts the service and "make test" runs its tests. Both first install the packages they need into .venv.

PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/pip install --disable-pip-version-check --require-hashes -r
# With 1, which a user may have set, pip refuses to change a virtual environment.
export PIP_USER = 0

# The product: the modules at the top, and the folders with their data files (pages, mails, password list, schema).
PACKAGES = cli credentials engines mails tables web
PRODUCT = $(filter-out main.py,$(wildcard *.py)) $(wildcard *.sql) pyproject.toml \
	$(shell find $(PACKAGES) -type f -not -path '*/__pycache__/*')

# Everything the tests read. "make check" runs them again when one of these files is newer than the last run.
SOURCES = $(PRODUCT) main.py $(wildcard *.md *.toml docs/*.* docs/security/* tests/*.* .pre-commit-config.yaml .github/*/*)

# POSTGRES=1 adds psycopg and its libpq, about 5 MB, for AUTHSVC_DATABASE=postgresql://… "make install" adds them where
# the installed file has them or the settings name such a database; "make install POSTGRES=" leaves them out. PASSKEYS=1
# adds fido2 and what it needs, about 5 MB, for passkeys.
ifneq (,$(filter install,$(MAKECMDGOALS)))
PASSKEYS ?= $(shell grep -ls site-packages/fido2/ $(DESTDIR)/opt/authsvc/authsvc.pyz)
POSTGRES ?= $(shell grep -ls -e site-packages/psycopg/ -e '^AUTHSVC_DATABASE=.\?postgres' \
	$(DESTDIR)/opt/authsvc/authsvc.pyz $(DESTDIR)/etc/authsvc/authsvc.env)
endif
PACKED = bottle.py bcrypt waitress segno prometheus_client \
	$(if $(POSTGRES),psycopg psycopg_binary psycopg_binary.libs psycopg_pool typing_extensions.py) \
	$(if $(PASSKEYS),fido2 cryptography cffi _cffi_backend*.so)
# The packages of that file by the names of their licences. shiv's own start code is in it, too.
LICENSED = bottle bcrypt waitress segno prometheus_client shiv \
	$(if $(POSTGRES),psycopg psycopg_binary psycopg_pool typing_extensions) $(if $(PASSKEYS),fido2 cryptography cffi)
# Packages that only some tests need: see [dependency-groups] in pyproject.toml.
EXTRAS = .venv/browser .venv/fuzz .venv/proxies .venv/release

# The compiled parts of psycopg and cffi are for one version of Python. The plain file runs on each from 3.11 on.
PYTHON_VERSION = $(if $(POSTGRES)$(PASSKEYS),$(shell $(or $(wildcard $(BIN)/python),$(PYTHON)) -c \
	'import sys; print("%d.%d" % sys.version_info[:2])'))
PYZ = dist/authsvc$(if $(POSTGRES),-postgres)$(if $(PASSKEYS),-passkeys-py$(PYTHON_VERSION)).pyz
SBOM = $(PYZ:.pyz=.cdx.json)
SITE_PACKAGES = $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.PHONY: help run test quick bench pyz release install lint check format lock clean

help:
	@echo "make run      install the packages needed and serve on http://127.0.0.1:5000"
	@echo "make test     install the packages needed and run all tests (ONLY=browser|container|faults|fuzz|postgres|proxies: one kind)"
	@echo "make quick    run the tests that start no process, in half a minute"
	@echo "make pyz      build the service as one file, dist/authsvc.pyz, for Python 3.11 or newer (POSTGRES=1: with psycopg;"
	@echo "              PASSKEYS=1: with fido2, for this version of Python only)"
	@echo "make release  build that file, the list of its packages (CycloneDX) and dist/SHA256SUMS"
	@echo "make install  install that file, its systemd units and its settings (as root); then follow deploy/README.md"
	@echo "make bench    compare its speed with other services, about 30 minutes (needs wrk, nginx, Node and npm)"
	@echo "make check    check format, lint, types and branch coverage (98 %); runs the tests if a file is newer"
	@echo "make lint     check format, lint and types only (installs the packages of the tests, about 470 MB)"
	@echo "make format   format the code with ruff"
	@echo "make lock     pin the newest versions that pyproject.toml allows, with hashes (needs uv)"
	@echo "make clean    delete everything that these commands have built"

run: .venv/run
	@exec $(BIN)/python authsvc.py

# ONLY=browser, container, faults, fuzz, postgres or proxies runs the tests of one kind. Tests of time run alone, after the others.
# "pytest -m long" runs the tests that take minutes. Here their folder is ignored, so that none counts as left out.
KIND = $(if $(ONLY),$(ONLY) and )
LONG = --ignore=tests/long
NONE = [ $$? -eq 5 ]  # pytest's exit code where no test is selected

# Compiled test files are kept, which saves some seconds of each further run.
test quick: export PYTHONDONTWRITEBYTECODE =

# COVERAGE=1 notes which lines run, which takes a quarter longer.
RUN = $(BIN)/$(if $(COVERAGE),coverage run,python)

test: .venv/dev $(if $(ONLY),$(filter $(addprefix .venv/,$(ONLY:container=fuzz proxies)),$(EXTRAS)),$(EXTRAS))
	@rm -rf .results .coverage .coverage.*
	$(RUN) -m pytest -n auto --dist worksteal -m "$(KIND)not (timing or long)" $(LONG) --record .results/parallel || $(NONE)
	$(RUN) -m pytest -m "$(KIND)timing and not long" $(LONG) --record .results/serial || $(NONE)
	@$(if $(COVERAGE),$(BIN)/coverage combine -q)
	@$(BIN)/python -m tests.results $(STRICT) .results/parallel .results/serial

quick: .venv/dev
	$(BIN)/pytest -q -n auto --dist worksteal \
		-m "not (slow or process or postgres or browser or proxies or faults or fuzz or timing or long)"

bench: .venv/dev .venv/proxies
	$(BIN)/python bench/run.py --write

pyz: $(PYZ)

# The modules are packed as they are and never installed into site-packages, where names like "auth" would collide.
# The content, the modes and the times in the file depend on the sources and the pinned packages only.
$(PYZ): .venv/pyz $(PRODUCT) LICENSE deploy/unpack.py deploy/licences.py
	@rm -rf build && mkdir -p build dist
	@cp -r $(filter-out main.py,$(wildcard *.py)) $(wildcard *.sql) pyproject.toml LICENSE $(PACKAGES) build
	@cd $(SITE_PACKAGES) && cp -r $(PACKED) $(CURDIR)/build
	@$(BIN)/python deploy/licences.py $(LICENSED) >build/LICENCES.txt
	@$(if $(PYTHON_VERSION),echo $(PYTHON_VERSION) >build/PYTHON)
	@find build -name __pycache__ -prune -exec rm -r {} +
	@chmod -R u=rwX,go=rX build
	@$(BIN)/python -c 'from pathlib import Path; from shiv import builder, cli; \
		start = Path("deploy/unpack.py").read_text(); \
		builder.MAIN_TEMPLATE = start.replace("{", "{{").replace("}", "}}"); cli.main()' \
		--site-packages build --entry-point authsvc:main --python '/usr/bin/env python3' --reproducible --output-file $@
	@rm -rf build
	@echo $@

release: $(PYZ) .venv/release
	@rm -rf build && mkdir build
	@cd $(SITE_PACKAGES) && cp -r $(LICENSED:=-*.dist-info) $(CURDIR)/build
	PYTHONPATH=build $(BIN)/cyclonedx-py environment -S --pyproject pyproject.toml --output-reproducible \
		-o $(SBOM) $(BIN)/python
	@rm -rf build
	cd dist && sha256sum $(notdir $(PYZ) $(SBOM)) >SHA256SUMS

# With DESTDIR=/other/root everything goes below that folder, and this system is not changed.
install: $(PYZ)
	install -D -m 644 $(PYZ) $(DESTDIR)/opt/authsvc/authsvc.pyz
	umask 022 && SHIV_ROOT=$(DESTDIR)/opt/authsvc/unpacked \
		/usr/bin/python3 -sP $(DESTDIR)/opt/authsvc/authsvc.pyz --help >/dev/null
	install -D -m 755 deploy/authsvc $(DESTDIR)/usr/local/sbin/authsvc
	install -D -m 644 -t $(DESTDIR)/etc/systemd/system $(wildcard deploy/*.service deploy/*.socket deploy/*.timer)
	$(if $(DESTDIR),,systemd-sysusers --inline 'u authsvc - "authsvc" /var/lib/authsvc')
	[ -e $(DESTDIR)/etc/authsvc/authsvc.env ] || \
		install -D -m 640 $(if $(DESTDIR),,-g authsvc) deploy/authsvc.env $(DESTDIR)/etc/authsvc/authsvc.env
	$(if $(DESTDIR),,systemctl daemon-reload)
	@echo "installed $(if $(POSTGRES),with psycopg,without psycopg (make install POSTGRES=1 adds it))"

# mypy reads the packages that the tests import.
lint: .venv/dev $(filter-out .venv/release,$(EXTRAS))
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

# Uses the coverage of the last "make test COVERAGE=1", and runs it when there is none or a source file is newer.
check: lint .coverage
	$(BIN)/coverage report

.coverage: $(SOURCES)
	$(MAKE) test COVERAGE=1

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

LOCK = uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade pyproject.toml

lock:
	$(LOCK) --extra metrics --extra passkeys --extra qr -o requirements/run.txt
	$(LOCK) --group dev -c requirements/run.txt -o requirements/dev.txt
	for group in $(notdir $(EXTRAS)); do \
		echo "requirements/$$group.txt"; \
		$(LOCK) --group $$group -c requirements/dev.txt -o requirements/$$group.txt || exit 1; \
	done
	$(LOCK) --extra metrics --extra passkeys --extra postgres --extra qr --group pyz -c requirements/dev.txt -o requirements/pyz.txt

clean:
	rm -rf .venv .results build dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -r {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "authsvc needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 run" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "this Python has no module venv; install it with: apt-get install python3-venv" >&2; exit 1; }
	@echo "making the folder .venv for the packages"
	@[ -e .venv ] && there=1; $(PYTHON) -m venv .venv || \
		{ [ "$$there" ] && echo "the folder .venv cannot be used: delete it if nobody needs it" >&2 || rm -rf .venv; exit 1; }

.venv/run: .venv/bin/python requirements/run.txt
	$(INSTALL) requirements/run.txt
	@touch $@

.venv/pyz: .venv/run requirements/pyz.txt
	$(INSTALL) requirements/pyz.txt
	@touch $@

$(EXTRAS): .venv/%: .venv/dev requirements/%.txt
	$(INSTALL) requirements/$*.txt
	@touch $@

.venv/dev: .venv/run requirements/dev.txt
	$(INSTALL) requirements/dev.txt
	@touch $@
