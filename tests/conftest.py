"""What the tests share: a hand-turned clock, a store on a real file, the application in-process, a real process."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

import guard
from auth import Auth
from authsvc import create_app
from settings import Settings, is_url
from storage import TABLES, Store, open_store
from tests import evidence, postgres

HERE = Path(__file__).resolve().parent.parent
COST = 4  # log2 of the bcrypt rounds, 1 ms


class Clock:
    """Unix seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Answer:
    """What a WSGI application said."""

    def __init__(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = int(status.split()[0])
        self.headers = {name.title(): value for name, value in headers}
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def session_id(self) -> str:
        """The id in the cookie that was set."""
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
        """Start it and wait for the line that says it accepts requests."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.program,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env={**clean_environ(), **self.environ},
                text=True,
            )
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), self.log

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


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    guard._log_floods.clear()
    for name in [name for name in os.environ if name.startswith("AUTHSVC_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def clock() -> Clock:
    return Clock()


# Whatever asks for ``engine``, most often by way of ``settings``, ``start`` or ``service``, runs on each; but for what
# is marked ``sqlite`` or ``once``.


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    alone = any(map(metafunc.definition.get_closest_marker, ("sqlite", "once")))
    if "engine" in metafunc.fixturenames and not alone:
        missing = pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING)
        metafunc.parametrize("engine", ["sqlite", pytest.param("postgres", marks=missing)], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """What keeps the rows in this test: "sqlite" or "postgres"."""
    name: str = getattr(request, "param", "sqlite")
    return name


@pytest.fixture(scope="session")
def postgresql() -> Iterator[postgres.Server]:
    """One PostgreSQL for all tests."""
    server = postgres.Server()
    yield server
    server.remove()


@pytest.fixture
def new_place(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[], str]:
    """Name a place at which there is no database yet, each time another."""
    if engine == "postgres":
        server: postgres.Server = request.getfixturevalue("postgresql")
        return server.new_place
    names = (f"authsvc{number or ''}.db" for number in itertools.count())
    return lambda: str(tmp_path / next(names))


@pytest.fixture
def place(engine: str, new_place: Callable[[], str], request: pytest.FixtureRequest) -> Iterator[str]:
    """Name a place: with the tables in it already where the test has them made anyway, which saves it 50 ms."""
    if engine == "postgres" and "db" in request.fixturenames:
        server: postgres.Server = request.getfixturevalue("postgresql")
        used = server.emptied.pop() if server.emptied else server.new_place()
        yield used
        server.empty(used)
    else:
        yield new_place()


@pytest.fixture
def settings(place: str) -> Settings:
    return Settings(database=place, bcrypt_cost=COST)


@pytest.fixture
def db(settings: Settings) -> Iterator[Store]:
    with closing(open_store(settings.database)) as store:
        yield store


@contextmanager
def ledger_of(place: str, timeout: float = 0) -> Iterator[Any]:
    """A connection that is not the store's; to a file it waits no longer than this for others."""
    if is_url(place):
        with closing(postgres.Ledger(place)) as ledger:
            yield ledger
    else:
        with closing(sqlite3.connect(place, timeout, isolation_level=None, check_same_thread=False)) as connection:
            yield connection


def rows_in(place: str) -> bytes:
    """All that is in the tables."""
    with ledger_of(place) as ledger:
        return repr([ledger.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES]).encode()


@pytest.fixture
def other(db: Store, settings: Settings) -> Iterator[Any]:
    """A connection that is not the store's, and does not wait."""
    with ledger_of(settings.database) as ledger:
        yield ledger


@pytest.fixture
def auth(db: Store, settings: Settings, clock: Clock) -> Auth:
    return Auth(db, settings, clock)


@pytest.fixture
def call(auth: Auth, settings: Settings) -> Client:
    """The application, in this process."""
    return Client(create_app(settings, auth))


@pytest.fixture
def start(tmp_path: Path, place: str) -> Iterator[Callable[..., Service]]:
    """Start a real process with these settings (AUTHSVC_… names); it is ended after the test."""
    started: list[Service] = []

    def start_one(**environ: str) -> Service:
        started.append(Service(tmp_path, **{"AUTHSVC_DATABASE": place, **environ}))
        return started[-1]

    yield start_one
    for service in started:
        service.end()


@pytest.fixture(scope="session")
def service_on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    one = Service(tmp_path_factory.mktemp("service"))
    yield one
    one.end()


@pytest.fixture(scope="session")
def service_on_postgres(tmp_path_factory: pytest.TempPathFactory, postgresql: postgres.Server) -> Iterator[Service]:
    one = Service(tmp_path_factory.mktemp("service"), AUTHSVC_DATABASE=postgresql.new_place())
    yield one
    one.end()


@pytest.fixture
def service(engine: str, request: pytest.FixtureRequest) -> Service:
    """One real process on this engine for all tests that only talk to it; use an email of your own."""
    one: Service = request.getfixturevalue(f"service_on_{engine}")
    return one


# The evidence: when all tests were run, each one that asvs.toml names must have been among them, and passed.

_PASSED = pytest.StashKey[set[str]]()
_SKIPPED = pytest.StashKey[set[str]]()
_LEFT_OUT = pytest.StashKey[set[str]]()
_UNSHOWN = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    for key in (_PASSED, _SKIPPED, _LEFT_OUT, _UNSHOWN):
        config.stash[key] = set()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[_LEFT_OUT].add(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped or report.when == "call":
        if report.skipped and "[postgres" in item.nodeid and not postgres.programs():
            return report  # the other engine shows it
        key = _PASSED if report.passed else _SKIPPED
        item.config.stash[key].add(item.nodeid.partition("[")[0])
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.stash[_LEFT_OUT]
    if whole and exitstatus == pytest.ExitCode.OK and not config.option.collectonly:
        passed, skipped = config.stash[_PASSED], config.stash[_SKIPPED]
        named = {test for entry in evidence.load() for test in evidence.tests_of(entry)}
        config.stash[_UNSHOWN] = {test for test in named if test not in passed or test in skipped}
        if config.stash[_UNSHOWN]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    unshown = config.stash[_UNSHOWN]
    for test in sorted(unshown):
        terminalreporter.write_line(f"asvs.toml names {test}, which did not run and pass", red=True)
