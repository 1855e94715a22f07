"""What the tests share: a clock set by hand, a database, the application in this process, and a real process."""

from __future__ import annotations

import functools
import gc
import io
import itertools
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import bcrypt
import hypothesis
import pytest

import log
from auth import Auth, _default_cost
from authsvc import create_app
from cli import commands
from engines.schema import TABLES
from mail import Mailer
from settings import Settings, is_url
from storage import DB
from tests import postgres
from tests.results import Recorder

pytest.register_assert_rewrite("tests.browser", "tests.firefox")  # plugins with fixtures, which tests also import

HERE = Path(__file__).resolve().parent.parent
# The start of a command line. Permissions do not bind root, unless it gives up these capabilities.
BOUND = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
COST = 4  # log2 of the bcrypt rounds, 1 ms

# The tests compare the same passwords with the same hashes thousands of times: what bcrypt answers is kept.
_compare, _compare_once = bcrypt.checkpw, functools.lru_cache(10_000)(bcrypt.checkpw)


def _checkpw(password: bytes, hashed_password: bytes) -> bool:
    return (_compare_once if hashed_password[3:7] == b"$04$" else _compare)(password, hashed_password)


bcrypt.checkpw = _checkpw
hypothesis.settings.register_profile("no deadline", deadline=None)  # an example takes long on a busy machine
hypothesis.settings.load_profile("no deadline")
os.environ["LANGUAGE"] = "C"  # or argparse looks for translations at each of its texts
commands.new_parser = functools.cache(commands.new_parser)  # it takes as long as most tests of a command

for name in [name for name in os.environ if name.startswith("AUTHSVC_")]:
    del os.environ[name]
sys.modules["segno"] = None  # type: ignore[assignment]
log.direct = True  # the tests read what the service in this process has logged; test_log.py tests the thread


MAILERS: list[Mailer] = []  # those of this test, whose threads may still read the database
_new_mailer = Mailer.__init__


def _remember_mailer(self: Mailer, *arguments: Any) -> None:
    _new_mailer(self, *arguments)
    MAILERS.append(self)


Mailer.__init__ = _remember_mailer  # type: ignore[assignment,method-assign]
MEASURED: dict[str, str] = {}  # the environment of a process of which the coverage is measured


class Clock:
    """A clock that stands still until a test advances it; in unix seconds."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Answer:
    """The answer of a WSGI application."""

    def __init__(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = int(status.split()[0])
        self.headers = {name.title(): value for name, value in reversed(headers)}  # the first of several counts
        self.set_cookies = [value for name, value in headers if name == "Set-Cookie"]
        self.cookies = dict(cookie.partition(";")[0].split("=", 1) for cookie in self.set_cookies)
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def session_id(self) -> str:
        """The session id in the cookie that was set."""
        return self.headers["Set-Cookie"].partition(";")[0].partition("=")[2]


class Client:
    """Calls a WSGI application as a server would."""

    def __init__(self, application: Any) -> None:
        self.application = application

    def __call__(
        self,
        method: str,
        path: str,
        form: Any = None,
        *,
        cookie: str | None = None,
        body: bytes | None = None,
        content_type: str = "application/x-www-form-urlencoded",
        **environ: Any,
    ) -> Answer:
        path, _, query = path.partition("?")
        if body is None:
            body = urlencode(form or {}).encode()
        environ = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_TYPE": content_type,
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.url_scheme": "http",
            **({"HTTP_COOKIE": cookie} if cookie is not None else {}),
            **environ,
        }
        said: list[Any] = []
        chunks = self.application(environ, lambda status, headers, exc_info=None: said.extend((status, headers)))
        return Answer(said[0], said[1], b"".join(chunks))


class Service:
    """A real ``python authsvc.py`` on a free port of this machine."""

    program: tuple[str, ...] = (sys.executable, str(HERE / "authsvc.py"))
    passed: tuple[int, ...] = ()  # descriptors that it inherits

    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder = folder
        self.environ = {
            "AUTHSVC_LISTEN": "127.0.0.1:0",
            "AUTHSVC_DATABASE": str(folder / "authsvc.db"),
            "AUTHSVC_BCRYPT_COST": str(COST),
            **environ,
        }
        self.log_file = folder / "log"
        self.start()

    def start(self) -> None:
        """Start it and wait for the line that says that it accepts requests."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.program,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env={**clean_environ(), **self.environ},
                text=True,
                pass_fds=self.passed,
            )
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        if not self.url.startswith("http://"):
            self.end()
            pytest.fail(f"the service did not start: {self.log}")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def command(self, *arguments: str) -> str:
        """Run one of the operator's commands with the same settings; return what it prints."""
        command = [*self.program, *arguments]
        environ = {**clean_environ(), **self.environ}
        return subprocess.run(command, cwd=self.folder, env=environ, text=True, capture_output=True, check=True).stdout

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=20)
        assert self.process.stdout
        self.process.stdout.close()
        return code


def clean_environ() -> dict[str, str]:
    """The environment of this process without any setting of the service."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AUTHSVC_")}


# Test files that need more packages than requirements/dev.txt, by a package and the target of make that installs it.
EXTRAS = {
    "test_firefox.py": ("playwright", ".venv/browser"),
    "test_pages.py": ("playwright", ".venv/browser"),
    "test_passkey_pages.py": ("playwright", ".venv/browser"),
    "test_openapi.py": ("schemathesis", ".venv/fuzz"),
    "test_contributing.py": ("yaml", ".venv/fuzz"),
    "test_container.py": ("yaml", ".venv/fuzz"),
    "test_half_sent.py": ("h2", ".venv/proxies"),
    "long/test_all_pages.py": ("playwright", ".venv/browser"),
    "long/test_half_sent.py": ("h2", ".venv/proxies"),
}
collect_ignore = [name for name, (package, _) in EXTRAS.items() if not find_spec(package)]


def left_out(chosen: list[str], names: list[str], folder: Path = HERE) -> list[str]:
    """Return those of these test files that are in the files and folders on the command line, relative to a folder."""
    paths = [(folder / argument.partition("::")[0]).resolve() for argument in chosen]
    return [name for name in names if any((HERE / "tests" / name).is_relative_to(path) for path in paths)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name in left_out(config.args, collect_ignore, config.invocation_params.dir):
        terminalreporter.write_line(
            f"tests/{name} was left out: make {EXTRAS[name][1]} installs the packages that it needs"
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="write the outcome of each test to this file")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files without a test of time where "make test" runs only those: to read all files takes seconds."""
    wanted = re.fullmatch(r"(\w+ and )?timing and not long", config.option.markexpr)
    if not wanted or config.args_source is not config.ArgsSource.TESTPATHS or collection_path.suffix != ".py":
        return None
    return "mark.timing" not in collection_path.read_text() or None


def pytest_configure(config: pytest.Config) -> None:
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 2**30:  # flushing to a disk takes a third of the time
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))
    config.pluginmanager.register(Recorder(config, config.getoption("--record")))


def pytest_collection_finish() -> None:
    # Modules and tests stay until the end: the garbage collector need not look at them again, and less often.
    gc.set_threshold(50_000, 20, 100)
    gc.freeze()
    # Of other processes few are measured, as a process with coverage takes twice as long to start.
    if config := os.environ.pop("COVERAGE_PROCESS_CONFIG", None):
        MEASURED["COVERAGE_PROCESS_CONFIG"] = config


def pytest_runtest_setup() -> None:  # no fixture for all tests, as that takes a millisecond for each
    log._floods.clear()
    _default_cost.cache_clear()


@pytest.fixture
def qr_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the optional package that draws QR codes. Without this fixture it is absent, as drawing takes 10 ms."""
    monkeypatch.delitem(sys.modules, "segno")


@pytest.fixture
def clock() -> Clock:
    return Clock()


# A test runs on SQLite. One that is marked ``both_engines`` and uses ``engine``, most often through ``settings``,
# ``start`` or ``service``, runs on PostgreSQL too.


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames and metafunc.definition.get_closest_marker("both_engines"):
        missing = pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING)
        on_postgres = pytest.param("postgres", marks=[pytest.mark.postgres, missing])
        metafunc.parametrize("engine", ["sqlite", on_postgres], indirect=True)


# Fixtures that start a process. A test that uses one is no quick test.
PROCESS_FIXTURES = frozenset({"start", "service", "postgresql"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures: list[str] = getattr(item, "fixturenames", [])
        if PROCESS_FIXTURES & set(fixtures):
            item.add_marker(pytest.mark.process)
        if "postgresql" in fixtures:
            item.add_marker(pytest.mark.postgres)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """The database engine of this test: "sqlite" or "postgres"."""
    name: str = getattr(request, "param", "sqlite")
    return name


@pytest.fixture(scope="session")
def postgresql() -> Iterator[postgres.Server]:
    """One PostgreSQL server for all tests of this worker."""
    server = postgres.Server()
    yield server
    server.remove()


@pytest.fixture
def new_database(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[], str]:
    """Return a function that names a new database at each call. It does not exist yet."""
    if engine == "postgres":
        server: postgres.Server = request.getfixturevalue("postgresql")
        return server.new_database
    names = (f"authsvc{number or ''}.db" for number in itertools.count())
    return lambda: str(tmp_path / next(names))


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite database with tables and no rows."""
    path = tmp_path_factory.mktemp("empty") / "authsvc.db"
    DB(str(path)).close()
    return path


@pytest.fixture
def database(engine: str, new_database: Callable[[], str], request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the name of a new database. Where ``db`` or ``people`` opens it, its tables exist, which saves time."""
    opened = not {"db", "people"}.isdisjoint(request.fixturenames)
    if engine == "postgres" and opened:
        server: postgres.Server = request.getfixturevalue("postgresql")
        used = server.emptied.pop() if server.emptied else server.new_database()
        yield used
        server.empty(used)
    else:
        path = new_database()
        if opened:
            shutil.copy(request.getfixturevalue("empty_file"), path)
        yield path


@pytest.fixture
def settings(database: str) -> Settings:
    return Settings(database=database, bcrypt_cost=COST)


@pytest.fixture
def db(settings: Settings) -> Iterator[DB]:
    with closing(DB(settings.database)) as db:
        yield db
        while MAILERS:  # SQLite crashes where one thread closes a connection that another one uses
            MAILERS.pop().stop(timeout=1)


@contextmanager
def raw_connection(database: str, timeout: float = 0) -> Iterator[Any]:
    """Open a connection of the test's own; on a file it waits up to ``timeout`` seconds for a lock."""
    if is_url(database):
        with closing(postgres.RawConnection(database)) as connection:
            yield connection
    else:
        with closing(
            sqlite3.connect(database, timeout=timeout, isolation_level=None, check_same_thread=False)
        ) as connection:
            yield connection


def rows_in(database: str) -> bytes:
    """Return the contents of all tables."""
    with raw_connection(database) as connection:
        return repr([connection.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES]).encode()


@pytest.fixture
def other(db: DB, settings: Settings) -> Iterator[Any]:
    """A connection of the test's own, which does not wait for locks."""
    with raw_connection(settings.database) as connection:
        yield connection


@pytest.fixture
def auth(db: DB, settings: Settings, clock: Clock) -> Auth:
    return Auth(db, settings, clock)


@pytest.fixture
def call(auth: Auth, settings: Settings) -> Client:
    """The application, in this process."""
    return Client(create_app(settings, auth))


@pytest.fixture
def start(tmp_path: Path, database: str) -> Iterator[Callable[..., Service]]:
    """Return a function that starts a real process with these AUTHSVC_… settings; it is ended after the test."""
    started: list[Service] = []

    def start_one(**environ: str) -> Service:
        started.append(Service(tmp_path, **{"AUTHSVC_DATABASE": database, **environ}))
        return started[-1]

    yield start_one
    for service in started:
        service.end()


@pytest.fixture(scope="session")
def service_on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    one = Service(tmp_path_factory.mktemp("service"), **MEASURED)
    yield one
    one.end()


@pytest.fixture(scope="session")
def service_on_postgres(tmp_path_factory: pytest.TempPathFactory, postgresql: postgres.Server) -> Iterator[Service]:
    one = Service(tmp_path_factory.mktemp("service"), AUTHSVC_DATABASE=postgresql.new_database())
    yield one
    one.end()


@pytest.fixture
def service(engine: str, request: pytest.FixtureRequest) -> Service:
    """One real process on this engine, shared by tests that only send requests; use an email of your own."""
    one: Service = request.getfixturevalue(f"service_on_{engine}")
    return one
