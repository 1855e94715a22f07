"""The strongroom: files of the first release, a process killed half way, and copies that are one moment and whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

import authsvc
import database
from auth import Auth, PasswordRejected, TokenRejected
from database import DatabaseRefused, StorageUnavailable, problems, restore
from settings import Settings
from storage import DB, Session, User
from tests.conftest import HERE, Clock, Service, clean_environ

pytestmark = pytest.mark.sqlite

FIRST_RELEASE = HERE / "tests" / "first_release.db"  # to open it there would leave a log beside it
MADE = 1_800_000_120  # when the last row was written into it
BOBS_SESSIONS = [f"00000000-0000-4000-8000-{number:012}" for number in (1, 2)]
CAROLS_TOKEN = "00000000-0000-4000-8000-000000000004"
PASSWORDS = {"bob@example.com": "b4l0u", "Eve@example.com": "t4rt1fl3tt3" * 9, "carol@example.com": "c4r0l"}

ROUNDS = int(os.environ.get("KILL_ROUNDS", "15"))  # of kill -9
MANY = 20_000  # rows, with which a migration or a restore takes long enough to be killed in its midst
HASH = b"$2b$04$" + b"." * 53


def back_up(db: DB, target: str) -> None:
    database.backup(db._path, target)


@pytest.fixture
def path(settings: Settings) -> Path:
    return Path(settings.database)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for whoever has the file ends soon."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.02)


@pytest.fixture
def lax_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def first_release(path: Path) -> Path:
    """A copy of the first release's file in the place of the database."""
    shutil.copyfile(FIRST_RELEASE, path)
    return path


@pytest.fixture
def untouched(tmp_path: Path) -> Path:
    """Another copy of it."""
    return Path(shutil.copyfile(FIRST_RELEASE, tmp_path / "untouched.db"))


def sql(path: Path, *statements: str) -> list[Any]:
    """Run the statements; return the rows of the last."""
    found: list[Any] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            found = connection.execute(statement).fetchall()
    return found


def tree(folder: Path) -> dict[str, bytes]:
    """All files; not the shared memory of SQLite, in which readers leave marks."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.endswith("-shm")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def content(path: Path) -> dict[str, list[Any]]:
    tables = sql(path, "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
    return {table: sql(path, f"SELECT * FROM {table}") for (table,) in tables}


def shape(path: Path) -> dict[str, Any]:
    """What SQLite says of each table: kind, columns, references, and indexes with theirs."""
    shapes: dict[str, Any] = {}
    for name, *kind in sql(path, "SELECT name, type, wr, strict FROM pragma_table_list WHERE schema = 'main'"):
        indexes = {
            index: (traits, sql(path, f"PRAGMA index_xinfo({index})"), sql(path, f"PRAGMA index_info({index})"))
            for _, index, *traits in sql(path, f"PRAGMA index_list({name})")
        }
        shapes[name] = (
            kind,
            sql(path, f"PRAGMA table_xinfo({name})"),
            sql(path, f"PRAGMA foreign_key_list({name})"),
            indexes,
        )
    # the condition of a partial index stands in its text only
    shapes["indexes"] = sorted(sql(path, "SELECT name, sql FROM sqlite_schema WHERE type = 'index'"))
    return shapes


def version(path: Path) -> int:
    return int(sql(path, "PRAGMA user_version")[0][0])


def whole(path: Path) -> bool:
    return sql(path, "PRAGMA integrity_check") == [("ok",)]


def fill(path: Path, *emails: str) -> Path:
    """Make a database with these users, and a session of each."""
    with closing(DB(path)) as db:
        for email in emails:
            user = db.add_user(email, HASH, MADE)
            session = Session(f"session of {email}", MADE, MADE, MADE + 1000, "", "")
            db.add_session(user, session, replaced=None, idle_since=0, most=5)
    return path


def emails(path: Path) -> list[str]:
    return [email for (email,) in sql(path, "SELECT email FROM users ORDER BY id")]


def damage(path: Path) -> None:
    """Flip the bytes of the page where the table of users begins."""
    (page,) = sql(path, "PRAGMA wal_checkpoint(TRUNCATE)", "SELECT rootpage FROM sqlite_schema WHERE name = 'users'")[0]
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        flipped = bytes(byte ^ 0xFF for byte in file.read(200))
        file.seek((page - 1) * 4096)
        file.write(flipped)


# From the first release


def test_the_users_of_the_first_release_go_on(first_release: Path, settings: Settings, clock: Clock) -> None:
    clock.now = MADE
    with closing(DB(first_release)) as db:
        auth = Auth(db, settings, clock)
        for session_id in BOBS_SESSIONS:
            assert auth.identify(session_id).email == "bob@example.com"
        for email, password in PASSWORDS.items():
            assert auth.identify(auth.log_in(email.upper(), password)[1]).email == email
            assert not auth.valid_login(email, password + "!")
        assert auth.update_password(CAROLS_TOKEN, "n3w") == 3
        assert auth.valid_login("carol@example.com", "n3w")
        assert [user.created_at for user in db.each_user()] == [None] * 3


def test_the_token_of_the_first_release_dies_when_it_would_have(
    first_release: Path, settings: Settings, clock: Clock
) -> None:
    with closing(DB(first_release)) as db:
        found = []
        for now in MADE - 3600, MADE - 3301, MADE - 3300, MADE, MADE + 599, MADE + 600:
            clock.now = now
            try:
                found.append(bool(Auth(db, settings, clock).update_password(CAROLS_TOKEN, "")))
            except PasswordRejected:  # the token is looked at first
                found.append(True)
            except TokenRejected:
                found.append(False)
    assert found == [False, False, True, True, True, False]


def test_the_rows_of_the_first_release_are_kept(first_release: Path, untouched: Path) -> None:
    DB(first_release).close()
    before, after = content(untouched), content(first_release)
    for table in before.keys() - {"users"}:
        assert after[table] == before[table]
    kept = "SELECT id, email, email_key, hashed_password, session_id, reset_token, reset_expires_at FROM users"
    assert sql(first_release, kept) == before["users"]


def test_a_lifted_file_is_as_a_new_one(first_release: Path, untouched: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.db"
    for file in first_release, new:
        DB(file).close()
    assert version(untouched) == 1
    assert version(first_release) == version(new) == database.VERSION
    assert shape(untouched) != shape(new)
    assert shape(first_release) == shape(new)
    assert problems(str(first_release)) == []


def test_a_file_is_lifted_once(first_release: Path) -> None:
    DB(first_release).close()
    before = content(first_release)
    DB(first_release).close()
    assert content(first_release) == before


@pytest.mark.slow
def test_the_service_starts_on_the_file_of_the_first_release(
    first_release: Path, start: Callable[..., Service]
) -> None:
    later = int(time.time()) - MADE
    sql(
        first_release,
        f"UPDATE users SET reset_expires_at = reset_expires_at + {later}",
        f"UPDATE sessions SET created_at = created_at + {later}, last_seen_at = last_seen_at + {later}, "
        f"expires_at = expires_at + {later}",
    )
    url = start().url
    for session_id in BOBS_SESSIONS:
        answer = requests.get(f"{url}/profile", cookies={"session_id": session_id}, timeout=10)
        assert answer.json() == {"email": "bob@example.com"}
    for email, password in PASSWORDS.items():
        assert requests.post(f"{url}/sessions", data={"email": email, "password": password}, timeout=10).ok
    form = {"email": "carol@example.com", "reset_token": CAROLS_TOKEN, "new_password": "n3w"}
    answers = [requests.put(f"{url}/reset_password", data=form, timeout=10).status_code for _ in range(2)]
    assert answers == [200, 403]


NEWER = f"PRAGMA user_version = {database.VERSION + 1}"

COMMANDS = [
    *(
        ["user", "list"],
        ["user", "add", "eve@x.io"],
        ["user", "show", "bob@x.io"],
        ["user", "delete", "bob@x.io", "--yes"],
    ),
    *(
        ["user", "disable", "bob@x.io"],
        ["user", "enable", "bob@x.io"],
        ["invite", "eve@x.io"],
        ["totp-off", "bob@x.io"],
    ),
    *(
        ["reset-link", "bob@x.io"],
        ["sessions", "list", "bob@x.io"],
        ["sessions", "end", "--all"],
        ["export"],
        ["prune"],
    ),
    *(["import", "users.csv"], ["backup", "copy"], ["check"]),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_touches_the_file_of_a_newer_release(
    impatient: None, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("AUTHSVC_DATABASE", str(path))
    monkeypatch.chdir(tmp_path)
    sql(fill(path, "bob@x.io"), "PRAGMA journal_mode = DELETE", NEWER)
    Path("users.csv").write_text(f"email,password_hash\neve@x.io,{HASH.decode()}\n")
    before = tree(tmp_path)
    assert authsvc.main(command) == 1
    assert tree(tmp_path) == before


def test_the_service_does_not_touch_the_file_of_a_newer_release(tmp_path: Path, path: Path) -> None:
    sql(fill(path, "bob@x.io"), "PRAGMA journal_mode = DELETE", NEWER)
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, HERE / "authsvc.py"],
        cwd=tmp_path,
        env={**clean_environ(), "AUTHSVC_DATABASE": str(path), "AUTHSVC_LISTEN": "127.0.0.1:0"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "newer release" in done.stderr
    assert tree(tmp_path) == before


def appeared(file: Path, process: subprocess.Popen[str]) -> None:
    while not file.exists():
        assert process.poll() is None or file.exists()
        time.sleep(0.001)


@pytest.mark.slow
def test_a_kill_in_the_midst_of_a_migration_leaves_either_version_whole(untouched: Path, tmp_path: Path) -> None:
    enlarged = tmp_path / "enlarged.db"
    shutil.copyfile(FIRST_RELEASE, enlarged)
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 10 UNION ALL SELECT i + 1 FROM n WHERE i < {MANY})"
    sql(
        enlarged,
        f"{numbers} INSERT INTO users SELECT i, i || '@x.io', i || '@x.io', 'hash', 's' || i, 't' || i, {MADE} FROM n",
        f"{numbers} INSERT INTO sessions SELECT i, 's' || i, i, {MADE}, {MADE}, {MADE} + i, '', '' FROM n",
        f"{numbers} INSERT INTO known_addresses SELECT i, 'a' || i, {MADE} FROM n",
    )
    counts = {table: len(rows) for table, rows in content(enlarged).items()}
    DB(tmp_path / "new.db").close()
    shapes = {1: shape(untouched), database.VERSION: shape(tmp_path / "new.db")}
    duration = 0.0
    left = []
    for number in range(ROUNDS + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "authsvc.db"
        shutil.copyfile(enlarged, path)
        process = subprocess.Popen(
            [sys.executable, HERE / "authsvc.py"],
            cwd=folder,
            env={**clean_environ(), "AUTHSVC_DATABASE": str(path), "AUTHSVC_LISTEN": "127.0.0.1:0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout
        with process.stdout:
            appeared(folder / "authsvc.db.lock", process)  # from here on it migrates
            began = time.monotonic()
            if number:
                time.sleep(random.uniform(0, duration))
            else:
                assert process.stdout.readline()
                duration = time.monotonic() - began  # of all that one may interrupt
            process.kill()
            assert process.wait(timeout=20) == -signal.SIGKILL
        left.append(version(path))
        assert whole(path)
        assert shape(path) == shapes[left[-1]]
        present = content(path)
        assert {table: len(present[table]) for table in counts} == counts
        DB(path).close()
        assert (version(path), problems(str(path)), len(emails(path))) == (database.VERSION, [], counts["users"])
        assert shape(path) == shapes[database.VERSION]
        shutil.rmtree(folder)
    assert left[0] == database.VERSION


# Backup


def test_a_backup_is_one_file_for_its_owner_only(lax_umask: None, db: DB, tmp_path: Path) -> None:
    bob = db.add_user("bob@x.io", HASH)
    (folder := tmp_path / "backups").mkdir()
    back_up(db, str(folder / "copy"))
    assert [file.name for file in folder.iterdir()] == ["copy"]
    assert stat.S_IMODE((folder / "copy").stat().st_mode) == 0o600
    assert sql(folder / "copy", "PRAGMA journal_mode") == [("delete",)]
    assert [file.name for file in folder.iterdir()] == ["copy"]
    assert problems(str(folder / "copy")) == []
    with closing(DB(folder / "copy")) as copy:
        assert list(copy.each_user()) == [bob]


def test_a_backup_has_all_that_was_there(first_release: Path, tmp_path: Path) -> None:
    with closing(DB(first_release)) as db:
        back_up(db, str(tmp_path / "copy"))
        assert content(tmp_path / "copy") == content(first_release)
        assert shape(tmp_path / "copy") == shape(first_release)


def test_a_backup_is_of_one_moment_while_others_write(db: DB, tmp_path: Path) -> None:
    written, stopping = threading.Semaphore(0), threading.Event()

    def write() -> int:
        pairs = 0
        while not stopping.is_set():
            assert db.stage_users((0, User(0, f"{name}{pairs}@x.io", HASH)) for name in "ab") == []
            assert db.add_staged_users() == 2
            pairs += 1
            written.release()
        return pairs

    counts = []
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            for number in range(8):
                assert written.acquire(timeout=5)
                least = len(list(db.each_user()))
                back_up(db, str(tmp_path / f"copy{number}"))
                most = len(list(db.each_user())) + 2
                counts.append((least, len(emails(tmp_path / f"copy{number}")), most))
        finally:
            stopping.set()
        assert writing.result(timeout=5) * 2 == len(list(db.each_user()))
    assert all(least <= count <= most and count % 2 == 0 for least, count, most in counts), counts


def test_a_backup_does_not_wait_for_a_transaction(impatient: None, db: DB, tmp_path: Path) -> None:
    db.add_user("bob@x.io", HASH)
    with db._transaction() as writer:
        writer.execute("UPDATE users SET email = 'eve@x.io'")
        back_up(db, str(tmp_path / "copy"))
    assert emails(tmp_path / "copy") == ["bob@x.io"]


@pytest.mark.parametrize("kind", ["a file", "an empty file", "a link to nowhere", "a folder", "the database"])
def test_a_backup_replaces_nothing(db: DB, path: Path, tmp_path: Path, kind: str) -> None:
    (folder := tmp_path / "backups").mkdir()
    place = path if kind == "the database" else folder / "copy"
    if kind == "a link to nowhere":
        place.symlink_to("nowhere")
    elif kind == "a folder":
        place.mkdir()
    elif place != path:
        place.write_bytes(b"" if "empty" in kind else b"precious")
    before = sorted(tmp_path.rglob("*")), tree(tmp_path)
    with pytest.raises(DatabaseRefused, match=r"\Acannot write the backup [^\n]*: File exists\Z"):
        back_up(db, str(place))
    assert (sorted(tmp_path.rglob("*")), tree(tmp_path)) == before


def test_a_backup_into_a_missing_folder_is_refused(db: DB, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(DatabaseRefused, match=r"\Acannot write the backup [^\n]*: No such file or directory\Z"):
        back_up(db, str(tmp_path / "missing" / "copy"))
    assert tree(tmp_path) == before


def test_of_a_damaged_database_no_backup_is_made(path: Path, tmp_path: Path) -> None:
    damage(fill(path, "bob@x.io"))
    (folder := tmp_path / "backups").mkdir()
    with closing(DB(path)) as db, pytest.raises(DatabaseRefused, match=r"\Acannot write the backup "):
        back_up(db, str(folder / "copy"))
    assert list(folder.iterdir()) == []


def test_of_a_database_with_rows_that_hang_on_nothing_no_backup_is_made(path: Path, tmp_path: Path) -> None:
    sql(fill(path, "bob@x.io"), "DELETE FROM users")  # this connection holds no foreign keys
    (folder := tmp_path / "backups").mkdir()
    with closing(DB(path)) as db, pytest.raises(DatabaseRefused, match="sessions hangs on nothing"):
        back_up(db, str(folder / "copy"))
    assert list(folder.iterdir()) == []


# Restore


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A backup, in which is who is not in the database."""
    with closing(DB(fill(tmp_path / "elsewhere.db", "copied@x.io", "carol@x.io"))) as db:
        back_up(db, str(tmp_path / "copy"))
    return tmp_path / "copy"


@pytest.fixture
def former(tmp_path: Path) -> Path:
    return tmp_path / "former.db"


COPIED = ["copied@x.io", "carol@x.io"]


def test_a_backup_takes_the_place_of_the_database_which_is_kept(
    lax_umask: None, path: Path, copy: Path, former: Path
) -> None:
    fill(path, "bob@x.io")
    before = content(path), copy.read_bytes()
    assert restore(str(copy), str(path), str(former)) is True
    assert (content(former), copy.read_bytes()) == before
    assert content(path) == content(copy)
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, former)] == [0o600, 0o600]
    assert problems(str(path)) == problems(str(former)) == []
    names = {file.name for file in path.parent.iterdir() if file.name.startswith(path.name)}
    assert names == {"authsvc.db", "authsvc.db.lock"}
    with closing(DB(path)) as db:
        assert db.add_user("eve@x.io", HASH).id == 3


def test_what_is_kept_has_what_a_killed_process_left_in_the_log(
    path: Path, copy: Path, former: Path, tmp_path: Path
) -> None:
    with closing(DB(tmp_path / "killed.db")) as db:
        db.add_user("bob@x.io", HASH)
        for suffix in "", "-wal":
            shutil.copy(f"{tmp_path / 'killed.db'}{suffix}", f"{path}{suffix}")
    assert restore(str(copy), str(path), str(former)) is True
    assert emails(former) == ["bob@x.io"]
    assert emails(path) == COPIED


def refuse_restore(copy: Path, path: Path, former: Path, reason: str) -> None:
    present = {file.name for file in path.parent.iterdir()}
    with pytest.raises(DatabaseRefused, match=rf"\Acannot restore [^\n]*copy: [^\n]*{reason}[^\n]*\Z"):
        restore(str(copy), str(path), str(former))
    assert {file.name for file in path.parent.iterdir()} - present <= {f"{path.name}.lock"}


@pytest.mark.parametrize("reading", [False, True])
def test_a_database_that_is_in_use_is_not_replaced(
    impatient: None, path: Path, copy: Path, former: Path, reading: bool
) -> None:
    with closing(DB(path)) as db:
        db.add_user("bob@x.io", HASH)
        listed = db.each_user()
        if reading:
            next(listed)
        refuse_restore(copy, path, former, "in use: stop the service first")
        assert db.add_user("eve@x.io", HASH).id == 2
        assert sql(path, "PRAGMA journal_mode") == [("wal",)]
        listed.close()  # type: ignore[attr-defined]
    assert emails(path) == ["bob@x.io", "eve@x.io"]


def test_a_database_that_another_connection_only_reads_is_not_replaced(
    impatient: None, path: Path, copy: Path, former: Path
) -> None:
    fill(path, "bob@x.io")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        assert reader.execute("SELECT count(*) FROM users").fetchone() == (1,)
        refuse_restore(copy, path, former, "in use: stop the service first")
    assert emails(path) == ["bob@x.io"]


def test_the_database_of_a_service_that_runs_is_not_replaced(
    impatient: None, path: Path, copy: Path, former: Path, start: Callable[..., Service]
) -> None:
    service = start()
    form = {"email": "bob@x.io", "password": "b4l0u"}
    assert requests.post(f"{service.url}/users", data=form, timeout=10).ok
    refuse_restore(copy, path, former, "in use: stop the service first")
    assert requests.post(f"{service.url}/sessions", data=form, timeout=10).ok
    assert service.end() == 0
    assert emails(path) == ["bob@x.io"]
    assert restore(str(copy), str(path), str(former)) is True
    assert emails(path) == COPIED


def test_a_restore_waits_for_the_lock_and_not_for_ever(
    impatient: None, path: Path, copy: Path, former: Path, tmp_path: Path
) -> None:
    fill(path, "bob@x.io")
    with closing(DB(tmp_path / "other.db")) as holder:
        os.unlink(f"{path}.lock")
        os.link(tmp_path / "other.db.lock", f"{path}.lock")
        with holder._transaction():
            refuse_restore(copy, path, former, "another process holds the write lock")
    assert emails(path) == ["bob@x.io"]


@pytest.mark.parametrize("log", [False, True])
def test_where_there_is_no_database_a_backup_becomes_it(
    lax_umask: None, path: Path, copy: Path, former: Path, log: bool, tmp_path: Path
) -> None:
    with closing(DB(tmp_path / "killed.db")) as db:
        db.add_user("bob@x.io", HASH)
        if log:  # of a database that is no more: it must not be applied to this one
            shutil.copy(tmp_path / "killed.db-wal", f"{path}-wal")
    assert restore(str(copy), str(path), str(former)) is False
    assert content(path) == content(copy)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (former.exists(), Path(f"{former}-wal").exists()) == (False, log)
    with closing(DB(path)) as db:
        assert db.add_user("eve@x.io", HASH).id == 3


def test_an_empty_file_is_no_database_that_would_be_replaced(path: Path, copy: Path, former: Path) -> None:
    path.touch()
    assert restore(str(copy), str(path), str(former)) is False
    assert content(path) == content(copy)


DAMAGED: dict[str, Callable[[Path], object]] = {
    "all but the tables' names": lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\xa5" * 8192),
    "rubbish": lambda path: path.write_bytes(b"\xa5" * 8192),
    "a header with rubbish": lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 8176),
    "cut off": lambda path: os.truncate(path, 4096),
    "less than a page": lambda path: os.truncate(path, 300),
    "one byte": lambda path: path.write_bytes(b"x"),
}


def test_a_journal_that_a_killed_process_left_is_not_applied_to_the_backup(
    path: Path, copy: Path, former: Path, tmp_path: Path
) -> None:
    fill(path, "bob@x.io")
    with closing(sqlite3.connect(path, isolation_level=None)) as killed:
        killed.execute("PRAGMA journal_mode = DELETE")
        killed.execute("PRAGMA cache_size = 1")
        killed.execute("BEGIN")
        killed.execute("UPDATE users SET email = 'eve@x.io' || hex(zeroblob(9000))")
        journal = Path(f"{path}-journal").read_bytes()
        assert journal[:8] == bytes.fromhex("d9d505f920a163d7")  # a hot one
        killed.execute("ROLLBACK")
    path.unlink()
    Path(f"{path}-journal").write_bytes(journal)
    assert restore(str(copy), str(path), str(former)) is False
    assert content(path) == content(copy)
    assert Path(f"{former}-journal").read_bytes() == journal


def test_a_damaged_database_that_a_service_has_open_is_not_replaced(
    start: Callable[..., Service], path: Path, copy: Path, former: Path
) -> None:
    fill(path, "bob@x.io")
    service = start(AUTHSVC_DATABASE=str(path))
    with path.open("r+b") as file:
        file.write(b"\xa5" * 512)
    refuse_restore(copy, path, former, "in use")
    service.end()
    assert restore(str(copy), str(path), str(former)) is True
    assert content(path) == content(copy)


def test_a_backup_is_prepared_before_it_takes_the_place(path: Path, copy: Path, former: Path) -> None:
    def prepare(partial: str) -> None:
        assert emails(path) == ["bob@x.io"]
        sql(Path(partial), "UPDATE users SET email = 'prepared'")

    fill(path, "bob@x.io")
    assert restore(str(copy), str(path), str(former), prepare)
    assert set(emails(path)) == {"prepared"}
    assert emails(former) == ["bob@x.io"]
    assert not list(path.parent.glob(".*"))


def test_the_file_of_a_newer_release_is_set_aside_by_who_goes_back(path: Path, copy: Path, former: Path) -> None:
    sql(fill(path, "bob@x.io"), NEWER)
    assert restore(str(copy), str(path), str(former)) is True
    assert emails(former) == ["bob@x.io"]
    assert content(path) == content(copy)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_database_is_set_aside_as_it_is(
    lax_umask: None, path: Path, copy: Path, former: Path, kind: str
) -> None:
    fill(path, "bob@x.io")
    DAMAGED[kind](path)
    before = path.read_bytes()
    assert restore(str(copy), str(path), str(former)) is True
    assert former.read_bytes() == before
    assert content(path) == content(copy)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with closing(DB(path)) as db:
        assert db.add_user("eve@x.io", HASH).id == 3


@pytest.mark.parametrize("kind", DAMAGED)
def test_the_log_of_a_damaged_database_is_set_aside_with_it(path: Path, copy: Path, former: Path, kind: str) -> None:
    fill(path, "bob@x.io")
    DAMAGED[kind](path)
    log = Path(f"{path}-wal")
    log.write_bytes(b"what may be saved of it" * 100)
    before = path.read_bytes(), log.read_bytes()
    assert restore(str(copy), str(path), str(former)) is True
    assert (former.read_bytes(), Path(f"{former}-wal").read_bytes()) == before
    assert content(path) == content(copy)


def test_a_database_with_a_damaged_page_is_set_aside(path: Path, copy: Path, former: Path) -> None:
    damage(fill(path, "bob@x.io"))
    pages = path.read_bytes()[4096:]  # the first may say that it is closed now
    assert restore(str(copy), str(path), str(former)) is True
    assert former.read_bytes()[4096:] == pages
    assert content(path) == content(copy)


def replaced_by(path: Path, *statements: str) -> None:
    path.unlink()
    sql(path, *statements)


BAD_BACKUPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "rubbish": (lambda copy: copy.write_bytes(b"\xa5" * 8192), "not a database"),
    "less than a page": (lambda copy: os.truncate(copy, 300), "it is not a database"),
    "empty": (lambda copy: os.truncate(copy, 0), "it is not a database"),
    "cut off": (lambda copy: os.truncate(copy, 8192), "malformed"),
    "damaged": (damage, ""),
    "missing": (lambda copy: copy.unlink(), "No such file or directory"),
    "a newer release's": (lambda copy: sql(copy, NEWER), "newer release"),
    "another program's": (
        lambda copy: replaced_by(copy, "CREATE TABLE notes (text TEXT)", "PRAGMA user_version = 1"),
        "another program",
    ),
    "without tables": (lambda copy: replaced_by(copy, "VACUUM"), "not a database"),
    "with rows that hang on nothing": (lambda copy: sql(copy, "DELETE FROM users"), "hangs on nothing"),
}


@pytest.mark.parametrize("kind", BAD_BACKUPS)
@pytest.mark.parametrize("replaces", [False, True])
def test_a_bad_backup_is_refused_and_nothing_changes(
    path: Path, copy: Path, former: Path, kind: str, replaces: bool
) -> None:
    if replaces:
        sql(fill(path, "bob@x.io"), "PRAGMA journal_mode = DELETE")
    break_it, reason = BAD_BACKUPS[kind]
    break_it(copy)
    before = tree(path.parent)
    refuse_restore(copy, path, former, reason)
    after = tree(path.parent)
    assert {name: after[name] for name in before} == before


def test_a_database_is_not_replaced_that_cannot_be_kept(path: Path, copy: Path, former: Path) -> None:
    fill(path, "bob@x.io")
    former.write_text("precious")
    with pytest.raises(DatabaseRefused, match="File exists"):
        restore(str(copy), str(path), str(former))
    assert former.read_text() == "precious"
    assert emails(Path(shutil.copyfile(path, path.with_name("seen.db")))) == ["bob@x.io"]


def test_a_refused_restore_lets_go_of_the_database(impatient: None, path: Path, copy: Path, former: Path) -> None:
    fill(path, "bob@x.io")
    former.write_text("precious")
    with pytest.raises(DatabaseRefused, match="File exists") as refusal:
        restore(str(copy), str(path), str(former))
    assert not Path(f"{path}-journal").exists(), refusal
    DB(path).close()
    assert emails(path) == ["bob@x.io"]


def test_a_backup_of_the_first_release_is_restored_and_lifted(
    path: Path, untouched: Path, former: Path, settings: Settings, clock: Clock
) -> None:
    fill(path, "bob@x.io")
    assert restore(str(untouched), str(path), str(former)) is True
    assert untouched.read_bytes() == FIRST_RELEASE.read_bytes()
    clock.now = MADE
    with closing(DB(path)) as db:
        auth = Auth(db, settings, clock)
        assert all(auth.valid_login(email, password) for email, password in PASSWORDS.items())
    assert (version(path), problems(str(path))) == (database.VERSION, [])


RESTORING = """
import sys
from database import restore
print("ready", flush=True)
sys.stdin.readline()
restore(*sys.argv[1:])
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_kill_in_the_midst_of_a_restore_leaves_the_one_or_the_other_whole(tmp_path: Path) -> None:
    contents = {}
    for name, number in ("old", MANY), ("new", MANY // 2):
        with closing(DB(tmp_path / name)) as db:
            db.stage_users((index, User(0, f"{name}{index}@x.io", HASH)) for index in range(number))
            db.add_staged_users()
        contents[name] = content(tmp_path / name)
    with closing(DB(tmp_path / "new")) as db:
        back_up(db, str(tmp_path / "copy"))
    duration, left = 0.0, []
    for number in range(ROUNDS + 1):  # the first is not killed in its midst
        (folder := tmp_path / str(number)).mkdir()
        path, former = folder / "authsvc.db", folder / "former.db"
        shutil.copyfile(tmp_path / "old", path)
        process = subprocess.Popen(
            [sys.executable, "-c", RESTORING, tmp_path / "copy", path, former],
            cwd=HERE,
            env=clean_environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        with process.stdin, process.stdout:
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("go\n")
            process.stdin.flush()
            if number % 3 != 1:  # two of three while it writes over the database, not before
                appeared(former, process)
            began = time.monotonic()
            if number:
                time.sleep(random.uniform(0, duration))
            else:
                assert process.stdout.readline() == "done\n"
                duration = time.monotonic() - began
            process.kill()
            process.wait(timeout=20)
        DB(path).close()  # the next start puts it right
        present = content(path)
        left.append("new" if present["users"] == contents["new"]["users"] else "old")
        assert present == contents[left[-1]]
        assert problems(str(path)) == []
        if former.exists():
            assert content(former) == contents["old"]
        else:
            assert left[-1] == "old"
        shutil.rmtree(folder)
    assert left[0] == "new"


# What is wrong


def test_nothing_is_wrong_with_a_good_database(path: Path, copy: Path, untouched: Path) -> None:
    files = [fill(path, "bob@x.io"), copy, untouched]
    before = [file.read_bytes() for file in files]
    assert [problems(str(file)) for file in files] == [[], [], []]
    assert [file.read_bytes() for file in files] == before


def test_to_look_at_what_a_killed_process_left_moves_nothing_out_of_its_log(db: DB, path: Path, tmp_path: Path) -> None:
    db.add_user("bob@x.io", HASH)
    (folder := tmp_path / "left").mkdir()
    for suffix in "", "-wal":
        shutil.copy(f"{path}{suffix}", folder)
    before = tree(folder)
    assert problems(str(folder / path.name)) == []
    assert tree(folder) == before


def test_nothing_is_wrong_with_a_database_in_use(db: DB, path: Path) -> None:
    db.add_user("bob@x.io", HASH)
    assert problems(str(path)) == []
    with db._transaction() as writer:
        writer.execute("UPDATE users SET email = 'eve@x.io'")
        assert problems(str(path)) == []


@pytest.mark.parametrize("kind", BAD_BACKUPS)
def test_what_is_wrong_with_a_file_is_said_and_it_stays(copy: Path, kind: str) -> None:
    break_it, reason = BAD_BACKUPS[kind]
    break_it(copy)
    before = tree(copy.parent)
    found = problems(str(copy))
    assert found
    assert reason in found[0]
    assert tree(copy.parent) == before


def test_an_index_that_misses_a_row_is_found(copy: Path) -> None:
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("DELETE FROM sqlite_schema WHERE name = 'sessions_user_id'")
        connection.execute("PRAGMA user_version = 2")
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.execute("CREATE INDEX sessions_user_id ON sessions (user_id) WHERE user_id > 1")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_schema SET sql = 'CREATE INDEX sessions_user_id ON sessions (user_id)' "
            "WHERE name = 'sessions_user_id'"
        )
    assert any("sessions_user_id" in fault for fault in problems(str(copy)))


def test_each_row_that_hangs_on_nothing_is_named(path: Path) -> None:
    with closing(DB(fill(path, "bob@x.io"))) as db:
        db.remember_address(1, "address", MADE, 10)
    sql(path, "DELETE FROM users")
    assert sorted(problems(str(path))) == [
        f"a row of {table} hangs on nothing" for table in ("known_addresses", "sessions")
    ]


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    assert len(problems(str(tmp_path))) == 1


# A file that is gone


def test_reading_makes_no_file_where_the_database_is_gone(path: Path) -> None:
    db = DB(path)
    db.add_user("bob@x.io", HASH)
    for suffix in "", "-wal", "-shm":
        os.unlink(f"{path}{suffix}")
    readers: list[Callable[[], object]] = [
        lambda: db.find_user_by(id=1),
        lambda: list(db.each_user()),
    ]
    for read in readers:
        with pytest.raises(StorageUnavailable), ThreadPoolExecutor(1) as pool:
            pool.submit(read).result(timeout=5)
    with pytest.raises(DatabaseRefused, match="unable to open"):
        back_up(db, str(path.with_name("copy")))
    assert problems(str(path)) == ["No such file or directory"]
    assert [file.name for file in path.parent.iterdir()] == ["authsvc.db.lock"]
    db.close()


def test_a_name_with_signs_of_an_address_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a?mode=memory#b%20c.db"
    fill(path, "bob@x.io")
    assert problems(str(path)) == []
    with closing(DB(path)) as db:
        back_up(db, str(tmp_path / "copy?x"))
        assert replace(db.find_user_by(id=1), session_id=None) == User(1, "bob@x.io", HASH, created_at=MADE)
    assert emails(tmp_path / "copy?x") == ["bob@x.io"]
