"""The SQLite engine: migration of the first release's file, newer files, and files that change under a service."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import requests

import authsvc
from auth import UNCOUNTED, Auth, PasswordRejected, TokenRejected
from engines import schema, sqlite
from engines.errors import DatabaseRefused, StorageUnavailable
from settings import Settings
from storage import DB, User
from tests.conftest import HERE, Clock, Service, clean_environ
from tests.crowd import written_log
from tests.sqlite_file import (
    FIRST_RELEASE,
    HASH,
    LAST_CHANGED,
    NEWER_RELEASE,
    back_up,
    content,
    damage_header,
    emails,
    files_in,
    fill,
    leave_log,
    problems,
    restore,
    run_sql,
    tables_of,
    version,
)

BOBS_SESSIONS = [f"00000000-0000-4000-8000-{number:012}" for number in (1, 2)]
CAROLS_TOKEN = "00000000-0000-4000-8000-000000000004"
PASSWORDS = {"bob@example.com": "b4l0u", "Eve@example.com": "t4rt1fl3tt3" * 9, "carol@example.com": "c4r0l"}

ROUNDS = int(os.environ.get("KILL_ROUNDS", "3"))  # how often a migration is killed
MANY = 20_000  # rows that make a migration long enough to be killed in the middle


@pytest.fixture
def path(settings: Settings) -> Path:
    return Path(settings.database)


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a lock ends soon."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.02)


@pytest.fixture
def first_release(path: Path) -> Path:
    """A copy of the first release's file, as the database."""
    shutil.copyfile(FIRST_RELEASE, path)
    return path


@pytest.fixture
def untouched(tmp_path: Path) -> Path:
    """Another copy of it."""
    return Path(shutil.copyfile(FIRST_RELEASE, tmp_path / "untouched.db"))


# The file of the first release


def test_users_of_the_first_release_can_go_on(first_release: Path, settings: Settings, clock: Clock) -> None:
    clock.now = LAST_CHANGED
    with closing(DB(first_release)) as db:
        auth = Auth(db, settings, clock)
        for session_id in BOBS_SESSIONS:
            assert auth.identify(session_id).email == "bob@example.com"
        for email, password in PASSWORDS.items():
            assert auth.identify(auth.log_in(email.upper(), password, caller=UNCOUNTED)[1]).email == email
            assert not auth.valid_login(email, password + "!")
        auth.update_password(CAROLS_TOKEN, "n3w")
        assert auth.valid_login("carol@example.com", "n3w")
        assert [user.created_at for user in db.each_user()] == [None] * 3


def test_a_reset_token_of_the_first_release_keeps_its_time(
    first_release: Path, settings: Settings, clock: Clock
) -> None:
    found = []
    with closing(DB(first_release)) as db:
        for seconds in -3600, -3301, -3300, 0, 599, 600:
            clock.now = LAST_CHANGED + seconds
            try:
                Auth(db, settings, clock).update_password(CAROLS_TOKEN, "")
            except PasswordRejected:  # the token is checked first
                found.append(True)
            except TokenRejected:
                found.append(False)
    assert found == [False, False, True, True, True, False]


def test_a_migration_keeps_all_rows(first_release: Path, untouched: Path) -> None:
    DB(first_release).close()
    before, after = content(untouched), content(first_release)
    for table in before.keys() - {"users", "sessions", "known_addresses"}:
        assert after[table] == before[table]
    assert after["sessions"] == [(*row, 0, None) for row in before["sessions"]]  # no second factor was shown yet
    assert before["known_addresses"]
    assert after["known_addresses"] == []  # no longer used
    columns = "SELECT id, email, email_key, hashed_password, session_id, reset_token, reset_expires_at FROM users"
    assert run_sql(first_release, columns) == before["users"]


@pytest.mark.slow
def test_a_migrated_file_has_the_tables_of_a_new_one(first_release: Path, untouched: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.db"
    for file in first_release, new:
        DB(file).close()
    assert version(untouched) == 1
    assert version(first_release) == version(new) == schema.SQLITE_VERSION
    assert tables_of(untouched) != tables_of(new)
    assert tables_of(first_release) == tables_of(new)
    assert problems(first_release) == []


def test_a_file_is_migrated_once(first_release: Path) -> None:
    DB(first_release).close()
    before = content(first_release)
    DB(first_release).close()
    assert content(first_release) == before


@pytest.mark.slow
def test_the_service_starts_on_the_file_of_the_first_release(
    first_release: Path, start: Callable[..., Service]
) -> None:
    passed = int(time.time()) - LAST_CHANGED
    run_sql(
        first_release,
        f"UPDATE users SET reset_expires_at = reset_expires_at + {passed}",
        f"UPDATE sessions SET created_at = created_at + {passed}, last_seen_at = last_seen_at + {passed}, "
        f"expires_at = expires_at + {passed}",
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


@contextmanager
def service_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the service on a file, perhaps to fail; kill it at the end."""
    process = subprocess.Popen(
        [sys.executable, HERE / "authsvc.py"],
        cwd=path.parent,
        env={**clean_environ(), "AUTHSVC_DATABASE": str(path), "AUTHSVC_LISTEN": "127.0.0.1:0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        yield process
        process.kill()


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.faults
def test_a_killed_migration_leaves_the_old_or_the_new_version(untouched: Path, tmp_path: Path) -> None:
    enlarged = tmp_path / "enlarged.db"
    shutil.copyfile(FIRST_RELEASE, enlarged)
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 10 UNION ALL SELECT i + 1 FROM n WHERE i < {MANY})"
    at = LAST_CHANGED
    run_sql(
        enlarged,
        f"{numbers} INSERT INTO users SELECT i, i || '@x.io', i || '@x.io', 'hash', 's' || i, 't' || i, {at} FROM n",
        f"{numbers} INSERT INTO sessions SELECT i, 's' || i, i, {at}, {at}, {at} + i, '', '' FROM n",
        f"{numbers} INSERT INTO known_addresses SELECT i, 'a' || i, {at} FROM n",
    )
    counts = {table: len(rows) for table, rows in content(enlarged).items()}
    DB(tmp_path / "new.db").close()
    tables = {1: tables_of(untouched), schema.SQLITE_VERSION: tables_of(tmp_path / "new.db")}
    duration = 0.0
    left = []
    for number in range(ROUNDS + 1):  # the first round measures how long there is to interrupt
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "authsvc.db"
        shutil.copyfile(enlarged, path)
        with service_process(path) as process:
            assert process.stdout
            wait_until(Path(f"{path}.lock").exists, "the migration did not begin")
            began = time.monotonic()
            if number:
                time.sleep(random.uniform(0, duration))
            else:
                assert process.stdout.readline()
                duration = time.monotonic() - began
        assert process.returncode == -signal.SIGKILL
        left.append(version(path))
        assert run_sql(path, "PRAGMA integrity_check") == [("ok",)]
        assert tables_of(path) == tables[left[-1]]
        present = content(path)
        addresses = counts["known_addresses"] if left[-1] == 1 else 0  # the migration deletes them
        assert {table: len(present[table]) for table in counts} == counts | {"known_addresses": addresses}
        DB(path).close()
        assert (version(path), problems(path), len(emails(path))) == (schema.SQLITE_VERSION, [], counts["users"])
        assert tables_of(path) == tables[schema.SQLITE_VERSION]
        shutil.rmtree(folder)
    assert left[0] == schema.SQLITE_VERSION


# The file of a newer release

COMMANDS = [
    "user list",
    "user add eve@x.io",
    "user show bob@x.io",
    "user delete bob@x.io --yes",
    "user disable bob@x.io",
    "user enable bob@x.io",
    "invite eve@x.io",
    "totp-off bob@x.io",
    "reset-link bob@x.io",
    "sessions list bob@x.io",
    "sessions end --all",
    "export",
    "prune",
    "import users.csv",
    "backup copy",
    "check",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_changes_the_file_of_a_newer_release(
    short_timeout: None, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("AUTHSVC_DATABASE", str(path))
    monkeypatch.chdir(tmp_path)
    run_sql(fill(path, "bob@x.io"), "PRAGMA journal_mode = DELETE", NEWER_RELEASE)
    Path("users.csv").write_text(f"email,password_hash\neve@x.io,{HASH.decode()}\n")
    before = files_in(tmp_path)
    assert authsvc.main(command.split()) == 1
    assert files_in(tmp_path) == before


@pytest.mark.process
def test_the_service_does_not_change_the_file_of_a_newer_release(tmp_path: Path, path: Path) -> None:
    run_sql(fill(path, "bob@x.io"), "PRAGMA journal_mode = DELETE", NEWER_RELEASE)
    before = files_in(tmp_path)
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
    assert files_in(tmp_path) == before


# A file that changes while it is in use


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    """A backup with another user than the database."""
    return back_up(fill(tmp_path / "elsewhere.db", "copied@x.io"), tmp_path / "backup")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept.db"


# Restores a backup, and stops when the write lock is taken and the file is not replaced yet, until it reads a line.
SLOW_RESTORE = """
import sys
from engines.sqlite_files import restore

def stop_at_link(event, arguments):
    if event == "os.link":
        print("locked", flush=True)
        sys.stdin.readline()

sys.addaudithook(stop_at_link)
restore(*sys.argv[1:], lambda _: None)
"""


@contextmanager
def slow_restore(*files: Path) -> Iterator[subprocess.Popen[str]]:
    """Restore in a process that holds the lock of the database and goes on when it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RESTORE, *files],
        cwd=HERE,
        env=clean_environ(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield process


def has_open(file: str) -> bool:
    """Return whether this process has a file open."""
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == file:
                return True
        except FileNotFoundError:  # closed meanwhile
            continue
    return False


@pytest.mark.process
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux lists the open files of a process")
@pytest.mark.parametrize("linked", [False, True], ids=["by its name", "by a symbolic link"])
def test_a_start_during_a_restore_is_refused(path: Path, backup: Path, kept: Path, linked: bool) -> None:
    fill(path, "bob@x.io")
    before, expected = content(path), content(backup)
    name = path
    if linked:
        name = path.with_name("link.db")
        name.symlink_to(path)
    with ThreadPoolExecutor(1) as pool, slow_restore(backup, path, kept) as process:
        starting = pool.submit(DB, name)
        wait_until(lambda: has_open(f"{path}.lock") or starting.done(), "the start did not reach the lock")
        # It has the old file open by now, and waits for the lock.
        process.communicate("go on\n", timeout=20)
        with pytest.raises(DatabaseRefused, match="was replaced"):
            starting.result(timeout=20)
    assert process.returncode == 0
    assert (content(kept), content(path)) == (before, expected)
    assert [file.name for file in path.parent.glob(f"{path.name}-*")] == []
    with closing(DB(name)) as db:
        assert [user.email for user in db.each_user()] == ["copied@x.io"]
        db.add_user("eve@x.io", HASH)
    assert emails(path) == ["copied@x.io", "eve@x.io"]


@pytest.mark.process
def test_a_start_after_a_restore_has_begun_waits_for_the_lock(
    short_timeout: None, path: Path, backup: Path, kept: Path
) -> None:
    fill(path, "bob@x.io")
    with slow_restore(backup, path, kept) as process:
        with pytest.raises(DatabaseRefused, match="another process holds the write lock"):
            DB(path)
        process.communicate("go on\n", timeout=20)
    assert emails(path) == ["copied@x.io"]
    assert emails(kept) == ["bob@x.io"]


def test_a_database_in_use_notices_that_its_damaged_file_was_replaced(path: Path, backup: Path, kept: Path) -> None:
    with closing(DB(path)) as db:
        db.add_user("bob@x.io", HASH)
        run_sql(path, "PRAGMA wal_checkpoint(TRUNCATE)")  # else SQLite would read the header from the write-ahead log
        damage_header(path)
        assert restore(backup, path, kept) is True
        restored = content(path)
        with pytest.raises(StorageUnavailable, match="was replaced"):
            db.add_user("eve@x.io", HASH)
        with pytest.raises(StorageUnavailable, match="was replaced"):
            db.check()
    assert content(path) == restored == content(backup)


@pytest.mark.slow
def test_a_service_notices_that_its_damaged_file_was_replaced(
    start: Callable[..., Service], path: Path, backup: Path, kept: Path
) -> None:
    fill(path, "bob@x.io")
    service = start()
    damage_header(path)
    assert restore(backup, path, kept) is True
    restored = content(path)
    form = {"email": "eve@x.io", "password": "3v3"}
    assert requests.get(f"{service.url}/health", timeout=10).status_code == 503
    assert requests.post(f"{service.url}/users", data=form, timeout=10).status_code == 503
    assert "authsvc.db was replaced while it was in use" in written_log(service)
    service.end()
    assert content(path) == restored == content(backup)
    service.start()
    assert requests.get(f"{service.url}/health", timeout=10).status_code == 200
    assert requests.post(f"{service.url}/users", data=form, timeout=10).status_code == 200


def test_reading_does_not_create_a_deleted_file(path: Path) -> None:
    db = DB(path)
    db.add_user("bob@x.io", HASH)
    for suffix in "", "-wal", "-shm":
        os.unlink(f"{path}{suffix}")
    readers: list[Callable[[], object]] = [lambda: db.find_user_by(id=1), lambda: list(db.each_user())]
    for read in readers:
        with pytest.raises(StorageUnavailable), ThreadPoolExecutor(1) as pool:
            pool.submit(read).result(timeout=5)
    with pytest.raises(DatabaseRefused, match="unable to open"):
        back_up(path, path.with_name("copy"))
    assert problems(path) == ["No such file or directory"]
    assert [file.name for file in path.parent.iterdir()] == ["authsvc.db.lock"]
    db.close()


# The write-ahead log is emptied


def log_size(path: Path) -> int:
    return Path(f"{path}-wal").stat().st_size


def test_an_emptied_log_loses_no_row_and_is_used_again(path: Path) -> None:
    with closing(DB(path)) as db:
        db.add_user("bob@x.io", HASH)
        assert db.find_user_by(id=1).email == "bob@x.io"
        assert log_size(path) > 0
        assert db.empty_log() is True
        assert log_size(path) == 0
        db.check()
        assert db.find_user_by(id=1).email == "bob@x.io"
        db.add_user("eve@x.io", HASH)
        assert log_size(path) > 0
    assert emails(path) == ["bob@x.io", "eve@x.io"]


@pytest.mark.parametrize("state", ["deleted", "replaced"])
@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_lost_file_is_noticed_after_the_log_was_emptied(path: Path, suffix: str, state: str) -> None:
    db = DB(path)
    db.add_user("bob@x.io", HASH)
    assert db.empty_log()
    file = Path(f"{path}{suffix}")
    if state == "replaced":
        (path.parent / "copy").write_bytes(file.read_bytes())
        os.replace(path.parent / "copy", file)
    else:
        file.unlink()
    for use in (db.check, db.empty_log, lambda: db.add_user("eve@x.io", HASH)):
        with pytest.raises(StorageUnavailable, match=f"{re.escape(str(file))} was {state} while it was in use"):
            use()
    db.close()


@pytest.mark.slow
def test_a_long_reader_keeps_the_log_and_delays_nobody(path: Path) -> None:
    with closing(DB(fill(path, "bob@x.io", "carol@x.io", "dave@x.io"))) as db:
        reading = db.each_user()
        next(reading)
        db.add_user("eve@x.io", HASH)
        began = time.monotonic()
        assert db.empty_log() is False
        assert time.monotonic() - began < 2  # a write waits for five seconds
        db.add_user("frank@x.io", HASH)
        assert [user.email for user in reading] == ["carol@x.io", "dave@x.io"]
        assert db.empty_log() is True
        with db._engine.transaction() as writer:
            assert writer.execute("PRAGMA busy_timeout").fetchone() == (5000,)
        assert len(list(db.each_user())) == 5


@pytest.mark.slow
def test_emptying_the_log_all_the_time_harms_no_use_of_the_database(path: Path, tmp_path: Path) -> None:
    """Two engines, as two processes have them, of which each adds users and reads them, while backups are made."""
    seconds, copies = 2.0, tmp_path / "copies"
    copies.mkdir()
    end = time.monotonic() + seconds
    counts: list[int] = []
    with closing(DB(path)) as first, closing(DB(path)) as second, ThreadPoolExecutor(8) as pool:

        def write(db: DB, name: str) -> list[str]:
            added: list[str] = []
            while time.monotonic() < end:
                added.append(f"{len(added)}@{name}")
                assert db.find_user_by(id=db.add_user(added[-1], HASH).id).email == added[-1]
            return added

        def read(db: DB) -> None:
            while time.monotonic() < end:
                found = [user.id for user in db.each_user()]
                assert found == list(range(1, len(found) + 1))

        def empty(db: DB) -> int:
            return sum(db.empty_log() for _ in iter(lambda: time.monotonic() < end, False))

        def copy() -> None:
            while time.monotonic() < end:
                copied = back_up(path, copies / str(len(counts)))
                counts.append(len(emails(copied)))

        added = [pool.submit(write, db, name) for db, name in ((first, "a"), (first, "b"), (second, "c"))]
        others = [pool.submit(read, first), pool.submit(read, second), pool.submit(copy)]
        emptied = [pool.submit(empty, db) for db in (first, second)]
        expected = sorted(name for one in added for name in one.result(30))
        assert [one.result(30) for one in others] == [None] * 3
        assert all(one.result(30) > 0 for one in emptied)
    assert sorted(emails(path)) == expected
    assert counts == sorted(counts)
    assert problems(path) == []


# Names of files


def test_a_file_name_may_contain_characters_of_a_url(tmp_path: Path) -> None:
    path = tmp_path / "a?mode=memory#b%20c.db"
    fill(path, "bob@x.io")
    assert problems(path) == []
    with closing(DB(path)) as db:
        back_up(path, tmp_path / "copy?x")
        user = User(1, "bob@x.io", HASH, created_at=LAST_CHANGED, last_login_at=LAST_CHANGED)
        assert db.find_user_by(id=1)._replace(session_id=None) == user
    assert emails(tmp_path / "copy?x") == ["bob@x.io"]


def test_a_symbolic_link_and_its_file_share_a_lock(short_timeout: None, path: Path) -> None:
    leave_log(path, "bob@x.io")
    link = path.with_name("link.db")
    link.symlink_to(path)
    with closing(DB(path)) as db, closing(DB(link)) as linked:
        refused = pytest.raises(StorageUnavailable, match="another process holds the write lock")
        with db._engine.transaction(), refused:
            linked.add_user("eve@x.io", HASH)
    assert not Path(f"{link}.lock").exists()


@pytest.mark.parametrize("by_link", [False, True], ids=["service by name", "service by link"])
def test_a_command_by_another_name_uses_the_same_files(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, by_link: bool
) -> None:
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(fill(path))
    service, command = (link, path) if by_link else (path, link)
    with closing(DB(service)) as db:
        db.add_user("bob@x.io", HASH)
        monkeypatch.setenv("AUTHSVC_DATABASE", str(command))
        assert authsvc.main(["user", "add", "eve@x.io"]) == 0
        assert [user.email for user in db.each_user()] == ["bob@x.io", "eve@x.io"]
        assert {file.name for file in path.parent.glob("authsvc.db*")} == {
            f"authsvc.db{suffix}" for suffix in ("", "-wal", "-shm", ".lock")
        }
        assert list(link.parent.iterdir()) == [link]
        db.check()


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_lost_file_is_noticed_through_a_symbolic_link(path: Path, suffix: str) -> None:
    link = path.with_name("link.db")
    link.symlink_to(fill(path))
    db = DB(link)
    db.add_user("bob@x.io", HASH)
    Path(f"{path}{suffix}").unlink()
    with pytest.raises(StorageUnavailable, match=f"{suffix} was deleted while it was in use"):
        db.add_user("eve@x.io", HASH)
    db.close()


def test_a_link_to_another_file_is_noticed(tmp_path: Path, path: Path) -> None:
    link, other = path.with_name("link.db"), fill(tmp_path / "other.db", "eve@x.io")
    link.symlink_to(fill(path))
    db = DB(link)
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(StorageUnavailable, match=r"link\.db was replaced"):
        db.add_user("bob@x.io", HASH)
    db.close()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nowhere.db", r"it is a symbolic link to .*/nowhere\.db, which does not exist"),
        ("missing/authsvc.db", r"it is a symbolic link to .*/missing/authsvc\.db, which does not exist"),
        ("link.db", "Too many levels of symbolic links"),
    ],
    ids=["to no file", "into no folder", "to itself"],
)
def test_a_link_that_leads_nowhere_is_refused_with_the_reason(tmp_path: Path, target: str, reason: str) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(target)
    with pytest.raises(DatabaseRefused, match=rf"\Acannot open the database {re.escape(str(link))}: {reason}\Z"):
        DB(link)
    assert [file.name for file in tmp_path.iterdir()] == ["link.db"]


def test_a_lock_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    lock_file = tmp_path / "authsvc.db.lock"
    lock_file.mkdir()
    with pytest.raises(DatabaseRefused, match=f"the lock file {lock_file}: Is a directory"):
        DB(str(tmp_path / "authsvc.db"))
