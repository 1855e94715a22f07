"""SQLite files: backup, restore, and finding what is wrong with one."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import requests

from auth import Auth
from engines import schema, sqlite, sqlite_files
from engines.errors import DatabaseRefused
from settings import Settings
from storage import DB, User
from tests.conftest import HERE, Clock, Service, clean_environ
from tests.sqlite_file import (
    FIRST_RELEASE,
    HASH,
    LAST_CHANGED,
    NEWER_RELEASE,
    back_up,
    content,
    damage_header,
    damage_users,
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

OTHER_USER = 65534  # "nobody"
IN_USE = "in use: stop the service first"


@pytest.fixture
def path(settings: Settings) -> Path:
    return Path(settings.database)


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a lock ends soon."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.02)


@pytest.fixture
def permissive_umask() -> Iterator[None]:
    """New files can be read by all users, unless the program prevents it."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def first_release(tmp_path: Path) -> Path:
    return Path(shutil.copyfile(FIRST_RELEASE, tmp_path / "first_release.db"))


@pytest.fixture(params=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file system has hard links or, like exFAT and some network drives, none."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)
    return str(request.param)


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


# Backup


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for backups."""
    (folder := tmp_path / "backups").mkdir()
    return folder


def test_a_backup_is_one_private_file(permissive_umask: None, links: str, db: DB, path: Path, folder: Path) -> None:
    bob = db.add_user("bob@x.io", HASH)
    back_up(path, folder / "copy")
    assert [file.name for file in folder.iterdir()] == ["copy"]
    assert mode_of(folder / "copy") == 0o600
    assert run_sql(folder / "copy", "PRAGMA journal_mode") == [("delete",)]
    assert [file.name for file in folder.iterdir()] == ["copy"]
    assert problems(folder / "copy") == []
    with closing(DB(folder / "copy")) as copy:
        assert list(copy.each_user()) == [bob]


def test_a_backup_contains_all_rows(first_release: Path, folder: Path) -> None:
    back_up(first_release, folder / "copy")
    assert content(folder / "copy") == content(first_release)
    assert tables_of(folder / "copy") == tables_of(first_release)


@pytest.mark.slow
def test_a_backup_is_one_snapshot_while_others_write(db: DB, path: Path, folder: Path) -> None:
    written, stopping = threading.Semaphore(0), threading.Event()

    def write() -> int:
        pairs = 0
        while not stopping.is_set():
            db.import_users(User(0, f"{name}{pairs}@x.io", HASH) for name in "ab")
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
                copy = back_up(path, folder / f"copy{number}")
                most = len(list(db.each_user())) + 2
                counts.append((least, len(emails(copy)), most))
        finally:
            stopping.set()
        assert writing.result(timeout=5) * 2 == len(list(db.each_user()))
    assert all(least <= count <= most and count % 2 == 0 for least, count, most in counts), counts


def test_a_backup_does_not_wait_for_a_transaction(short_timeout: None, db: DB, path: Path, folder: Path) -> None:
    db.add_user("bob@x.io", HASH)
    with db._engine.transaction() as writer:
        writer.execute("UPDATE users SET email = 'eve@x.io'")
        back_up(path, folder / "copy")
    assert emails(folder / "copy") == ["bob@x.io"]


@pytest.mark.parametrize("kind", ["a file", "an empty file", "a broken link", "a folder", "the database"])
def test_a_backup_never_replaces_a_file(links: str, db: DB, path: Path, folder: Path, kind: str) -> None:
    target = path if kind == "the database" else folder / "copy"
    if kind == "a broken link":
        target.symlink_to("nowhere")
    elif kind == "a folder":
        target.mkdir()
    elif target != path:
        target.write_bytes(b"" if "empty" in kind else b"precious")
    before = sorted(path.parent.rglob("*")), files_in(path.parent)
    with pytest.raises(DatabaseRefused, match=r"\Acannot write the backup [^\n]*: File exists\Z"):
        back_up(path, target)
    assert (sorted(path.parent.rglob("*")), files_in(path.parent)) == before


def test_a_backup_to_a_missing_folder_is_refused(db: DB, path: Path, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    with pytest.raises(DatabaseRefused, match=r"\Acannot write the backup [^\n]*: No such file or directory\Z"):
        back_up(path, tmp_path / "missing" / "copy")
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_users, ""),
        # A connection of sqlite3 does not enforce foreign keys.
        (lambda path: run_sql(path, "DELETE FROM users"), "foreign key violation in sessions"),
    ],
    ids=["a damaged page", "a row without its user"],
)
def test_a_damaged_database_is_not_backed_up(
    path: Path, folder: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(fill(path, "bob@x.io"))
    with closing(DB(path)), pytest.raises(DatabaseRefused, match=rf"\Acannot write the backup .*{reason}"):
        back_up(path, folder / "copy")
    assert list(folder.iterdir()) == []


# Restore

RESTORED = ["copied@x.io", "carol@x.io"]


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    """A backup, with other users than the database."""
    database = fill(tmp_path / "elsewhere.db", *RESTORED)
    backup = back_up(database, tmp_path / "backup")
    for file in tmp_path.glob("elsewhere.db*"):
        file.unlink()
    return backup


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The name under which a restore keeps the old database."""
    return tmp_path / "kept.db"


def restore_is_refused(backup: Path, path: Path, kept: Path, reason: str) -> None:
    present = {file.name for file in path.parent.iterdir()}
    with pytest.raises(DatabaseRefused, match=rf"\Acannot restore [^\n]*backup: [^\n]*{reason}[^\n]*\Z"):
        restore(backup, path, kept)
    assert {file.name for file in path.parent.iterdir()} - present <= {f"{path.name}.lock"}


def test_a_restore_replaces_the_database_and_keeps_the_old_one(
    permissive_umask: None, links: str, path: Path, backup: Path, kept: Path
) -> None:
    fill(path, "bob@x.io")
    before = content(path), backup.read_bytes()
    assert restore(backup, path, kept) is True
    assert (content(kept), backup.read_bytes()) == before
    assert content(path) == content(backup)
    assert [mode_of(file) for file in (path, kept)] == [0o600, 0o600]
    assert [file.stat().st_nlink for file in (path, kept)] == [1, 1]
    assert problems(path) == problems(kept) == []
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.lock", kept.name, backup.name}
    with closing(DB(path)) as db:
        assert db.add_user("eve@x.io", HASH).id == 3


def test_the_kept_database_contains_the_log_of_a_killed_process(
    links: str, path: Path, backup: Path, kept: Path
) -> None:
    leave_log(path, "bob@x.io")
    assert restore(backup, path, kept) is True
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.lock", kept.name, backup.name}
    assert emails(kept) == ["bob@x.io"]
    assert emails(path) == RESTORED


@pytest.mark.parametrize("reading", [False, True])
def test_a_database_in_use_is_not_replaced(
    short_timeout: None, path: Path, backup: Path, kept: Path, reading: bool
) -> None:
    with closing(DB(path)) as db:
        db.add_user("bob@x.io", HASH)
        rows = db._engine.read_each("SELECT id FROM users")
        if reading:
            next(rows)
        restore_is_refused(backup, path, kept, IN_USE)
        assert db.add_user("eve@x.io", HASH).id == 2
        assert run_sql(path, "PRAGMA journal_mode") == [("wal",)]
        rows.close()  # type: ignore[attr-defined]
    assert emails(path) == ["bob@x.io", "eve@x.io"]


def test_a_database_that_a_connection_only_reads_is_not_replaced(
    short_timeout: None, path: Path, backup: Path, kept: Path
) -> None:
    fill(path, "bob@x.io")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        assert reader.execute("SELECT count(*) FROM users").fetchone() == (1,)
        restore_is_refused(backup, path, kept, IN_USE)
    assert emails(path) == ["bob@x.io"]


@pytest.mark.parametrize("damage", [None, damage_users], ids=["complete", "with a damaged page"])
def test_the_database_of_a_running_service_is_not_replaced(
    short_timeout: None,
    path: Path,
    backup: Path,
    kept: Path,
    start: Callable[..., Service],
    damage: Callable[[Path], object] | None,
) -> None:
    service = start()
    form = {"email": "bob@x.io", "password": "b4l0u"}
    assert requests.post(f"{service.url}/users", data=form, timeout=10).ok
    if damage:
        damage(path)
    before = path.stat().st_ino  # the content may change: the service moves its write-ahead log into the file
    restore_is_refused(backup, path, kept, IN_USE)
    if not damage:
        assert requests.post(f"{service.url}/sessions", data=form, timeout=10).ok
    assert path.stat().st_ino == before
    assert service.end() == 0
    assert restore(backup, path, kept) is True
    assert emails(path) == RESTORED


def test_a_restore_does_not_wait_long_for_the_lock(
    short_timeout: None, path: Path, backup: Path, kept: Path, tmp_path: Path
) -> None:
    fill(path, "bob@x.io")
    with closing(DB(tmp_path / "other.db")) as holder:
        os.unlink(f"{path}.lock")
        os.link(tmp_path / "other.db.lock", f"{path}.lock")
        with holder._engine.transaction():
            restore_is_refused(backup, path, kept, "another process holds the write lock")
    assert emails(path) == ["bob@x.io"]


@pytest.mark.parametrize("log", [False, True], ids=["nothing left", "a log left"])
def test_a_backup_is_restored_where_there_is_no_database(
    permissive_umask: None, path: Path, backup: Path, kept: Path, log: bool
) -> None:
    if log:  # the log of a deleted database must not be applied to the restored one
        leave_log(path, "bob@x.io").unlink()
    assert restore(backup, path, kept) is False
    assert content(path) == content(backup)
    assert mode_of(path) == 0o600
    assert (kept.exists(), Path(f"{kept}-wal").exists()) == (False, log)
    with closing(DB(path)) as db:
        assert db.add_user("eve@x.io", HASH).id == 3


def test_an_empty_file_is_not_kept(path: Path, backup: Path, kept: Path) -> None:
    path.touch()
    assert restore(backup, path, kept) is False
    assert content(path) == content(backup)
    assert not kept.exists()


def test_the_journal_of_a_deleted_database_is_not_applied_to_the_restored_one(
    path: Path, backup: Path, kept: Path
) -> None:
    fill(path, "bob@x.io")
    with closing(sqlite3.connect(path, isolation_level=None)) as killed:
        killed.execute("PRAGMA journal_mode = DELETE")
        killed.execute("PRAGMA cache_size = 1")
        killed.execute("BEGIN")
        killed.execute("UPDATE users SET email = 'eve@x.io' || hex(zeroblob(9000))")
        journal = Path(f"{path}-journal").read_bytes()
        assert journal[:8] == bytes.fromhex("d9d505f920a163d7")  # SQLite would roll it back
        killed.execute("ROLLBACK")
    path.unlink()
    Path(f"{path}-journal").write_bytes(journal)
    assert restore(backup, path, kept) is False
    assert content(path) == content(backup)
    assert Path(f"{kept}-journal").read_bytes() == journal


def test_a_backup_is_prepared_before_it_replaces_the_database(path: Path, backup: Path, kept: Path) -> None:
    def prepare(temporary: str) -> None:
        assert emails(path) == ["bob@x.io"]
        run_sql(Path(temporary), "UPDATE users SET email = 'prepared'")

    fill(path, "bob@x.io")
    assert sqlite_files.restore(str(backup), str(path), str(kept), prepare)
    assert set(emails(path)) == {"prepared"}
    assert emails(kept) == ["bob@x.io"]
    assert not list(path.parent.glob(".*"))


def test_a_log_that_the_preparation_leaves_is_restored_too(path: Path, backup: Path, kept: Path) -> None:
    # The last connection that is closed moves the write-ahead log into the file. It ignores a full disk.
    def prepare(temporary: str) -> None:
        with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("UPDATE users SET email = 'prepared'")
            left = {suffix: Path(temporary + suffix).read_bytes() for suffix in ("", "-wal")}
        for suffix, data in left.items():
            Path(temporary + suffix).write_bytes(data)

    assert sqlite_files.restore(str(backup), str(path), str(kept), prepare) is False
    assert set(emails(path)) == {"prepared"}
    assert problems(path) == []


def test_the_file_of_a_newer_release_is_kept(path: Path, backup: Path, kept: Path) -> None:
    run_sql(fill(path, "bob@x.io"), NEWER_RELEASE)
    assert restore(backup, path, kept) is True
    assert emails(kept) == ["bob@x.io"]
    assert content(path) == content(backup)


DAMAGED: dict[str, Callable[[Path], object]] = {
    "all but the first page": lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\xa5" * 8192),
    "the header": damage_header,
    "the whole file": lambda path: path.write_bytes(b"\xa5" * 8192),
    "all but the header": lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 8176),
    "cut after a page": lambda path: os.truncate(path, 4096),
    "cut in the first page": lambda path: os.truncate(path, 300),
    "one byte": lambda path: path.write_bytes(b"x"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_database_is_kept_as_it_is(
    permissive_umask: None, path: Path, backup: Path, kept: Path, kind: str
) -> None:
    fill(path, "bob@x.io")
    DAMAGED[kind](path)
    before = path.read_bytes()
    assert restore(backup, path, kept) is True
    assert kept.read_bytes() == before
    assert content(path) == content(backup)
    assert mode_of(path) == 0o600
    with closing(DB(path)) as db:
        assert db.add_user("eve@x.io", HASH).id == 3


@pytest.mark.parametrize("kind", DAMAGED)
def test_the_log_of_a_damaged_database_is_kept_with_it(
    links: str, path: Path, backup: Path, kept: Path, kind: str
) -> None:
    fill(path, "bob@x.io")
    DAMAGED[kind](path)
    log = Path(f"{path}-wal")
    log.write_bytes(b"perhaps something can be recovered" * 100)
    before = path.read_bytes(), log.read_bytes()
    assert restore(backup, path, kept) is True
    assert (kept.read_bytes(), Path(f"{kept}-wal").read_bytes()) == before
    assert content(path) == content(backup)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_service_leaves_a_damaged_database_and_its_log_as_they_are(path: Path, kind: str) -> None:
    fill(path, "bob@x.io")
    DAMAGED[kind](path)
    log = Path(f"{path}-wal")
    log.write_bytes(b"perhaps something can be recovered" * 100)
    before = path.read_bytes(), log.read_bytes()
    with pytest.raises(DatabaseRefused):
        DB(path)
    gc.collect()  # SQLite deletes the log of a damaged file where it closes a connection that may write
    assert (path.read_bytes(), log.read_bytes()) == before


def test_a_database_with_a_damaged_page_is_kept(path: Path, backup: Path, kept: Path) -> None:
    damage_users(fill(path, "bob@x.io"))
    pages = path.read_bytes()[4096:]  # the first page changes: its header contains the journal mode
    assert restore(backup, path, kept) is True
    assert kept.read_bytes()[4096:] == pages
    assert content(path) == content(backup)


def replace_by(path: Path, *statements: str) -> None:
    path.unlink()
    run_sql(path, *statements)


BAD_BACKUPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a database": (lambda backup: backup.write_bytes(b"\xa5" * 8192), "not a database"),
    "less than a page": (lambda backup: os.truncate(backup, 300), "it is not a database"),
    "empty": (lambda backup: os.truncate(backup, 0), "it is not a database"),
    "cut off": (lambda backup: os.truncate(backup, 8192), "malformed"),
    "damaged": (damage_users, ""),
    "missing": (lambda backup: backup.unlink(), "No such file or directory"),
    "of a newer release": (lambda backup: run_sql(backup, NEWER_RELEASE), "newer release"),
    "of another program": (
        lambda backup: replace_by(backup, "CREATE TABLE notes (text TEXT)", "PRAGMA user_version = 1"),
        "another program",
    ),
    "without tables": (lambda backup: replace_by(backup, "VACUUM"), "not a database"),
    "with rows without their user": (
        lambda backup: run_sql(backup, "DELETE FROM users"),
        "foreign key violation in sessions",
    ),
}


@pytest.mark.parametrize("kind", BAD_BACKUPS)
@pytest.mark.parametrize("replaces", [False, True], ids=["no database", "a database"])
def test_a_bad_backup_is_refused_and_changes_nothing(
    path: Path, backup: Path, kept: Path, kind: str, replaces: bool
) -> None:
    if replaces:
        run_sql(fill(path, "bob@x.io"), "PRAGMA journal_mode = DELETE")
    damage, reason = BAD_BACKUPS[kind]
    damage(backup)
    before = files_in(path.parent)
    restore_is_refused(backup, path, kept, reason)
    after = files_in(path.parent)
    assert {name: after[name] for name in before} == before


def test_a_restore_never_replaces_another_file(
    short_timeout: None, links: str, path: Path, backup: Path, kept: Path
) -> None:
    fill(path, "bob@x.io")
    kept.write_text("precious")
    restore_is_refused(backup, path, kept, "File exists")
    assert kept.read_text() == "precious"
    assert not Path(f"{path}-journal").exists()
    with closing(DB(path)) as db:  # the refused restore has given up its locks
        assert [user.email for user in db.each_user()] == ["bob@x.io"]


def test_a_backup_of_the_first_release_is_restored_and_migrated(
    path: Path, first_release: Path, kept: Path, settings: Settings, clock: Clock
) -> None:
    fill(path, "bob@x.io")
    assert restore(first_release, path, kept) is True
    assert first_release.read_bytes() == FIRST_RELEASE.read_bytes()
    clock.now = LAST_CHANGED
    with closing(DB(path)) as db:
        assert Auth(db, settings, clock).valid_login("bob@example.com", "b4l0u")
    assert (version(path), problems(path)) == (schema.SQLITE_VERSION, [])


@pytest.mark.parametrize("damage", [lambda _: None, damage_header], ids=["complete", "damaged"])
def test_a_restore_replaces_the_file_that_a_symbolic_link_names(
    path: Path, backup: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    database = elsewhere / "real.db"
    fill(database, "bob@x.io")
    damage(database)
    path.symlink_to(database)
    assert restore(backup, path, elsewhere / "kept.db") is True
    assert path.readlink() == database
    assert emails(database) == RESTORED
    if damage is not damage_header:
        assert emails(elsewhere / "kept.db") == ["bob@x.io"]
    assert {file.name for file in elsewhere.iterdir()} == {"real.db", "real.db.lock", "kept.db"}
    assert {file.name for file in tmp_path.iterdir()} == {"elsewhere", backup.name, path.name}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")
@pytest.mark.parametrize("damage", [lambda _: None, damage_header], ids=["complete", "damaged"])
def test_a_file_that_root_restores_has_the_owner_of_the_old_one(
    links: str, path: Path, backup: Path, kept: Path, damage: Callable[[Path], object]
) -> None:
    fill(path, "bob@x.io")
    damage(path)
    os.chown(path, OTHER_USER, OTHER_USER)
    assert restore(backup, path, kept) is True
    owners = [(file.stat().st_uid, file.stat().st_gid, mode_of(file)) for file in (path, kept)]
    assert owners == [(OTHER_USER, OTHER_USER, 0o600)] * 2


# Restores in a child process for each step, and kills it before the step; the last child is not killed. A step is an
# operation on a file. The names in audit events are those of the Python documentation; os.replace() is an os.rename.
KILLED_RESTORES = """
import errno, os, shutil, signal, sys
from contextlib import closing
from engines.sqlite_files import restore
from storage import DB

STEPS = {"open", "os.chown", "os.link", "os.remove", "os.rename", "sqlite3.connect", "tempfile.mkstemp"}

def no_links(*_):
    raise OSError(errno.EPERM, "no hard links")

if sys.argv[1] == "no links":
    os.link = no_links

def end_sessions(path):
    with closing(DB(path)) as db:
        db.end_all_sessions()

def killed_before(step, folder):
    left = step

    def count(event, arguments):
        nonlocal left
        if event in STEPS:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    restore("backup", f"{folder}/authsvc.db", f"{folder}/kept.db", end_sessions)

step, status = 0, signal.SIGKILL
while status == signal.SIGKILL:
    step += 1
    shutil.copytree("template", str(step))
    child = os.fork()
    if not child:
        killed_before(step, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
assert status == 0, status
print(step)
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.faults
@pytest.mark.parametrize("file_system", ["links", "no links"])
@pytest.mark.parametrize("kind", ["complete", "damaged"])
def test_a_killed_restore_leaves_the_old_or_the_new_database(
    tmp_path: Path, backup: Path, kind: str, file_system: str
) -> None:
    (template := tmp_path / "template").mkdir()
    leave_log(template / "authsvc.db", "bob@x.io")
    if kind == "damaged":
        for suffix in "", "-wal":
            damage_header(Path(f"{template / 'authsvc.db'}{suffix}"))
    damaged = (template / "authsvc.db").read_bytes(), (template / "authsvc.db-wal").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RESTORES, file_system],
        cwd=tmp_path,
        env={**clean_environ(), "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    states = []
    for step in range(1, int(done.stdout) + 1):
        path, kept = tmp_path / str(step) / "authsvc.db", tmp_path / str(step) / "kept.db"
        if kind == "damaged" and path.read_bytes() == damaged[0]:
            states.append("old")
            logs = [file for file in (Path(f"{path}-wal"), Path(f"{kept}-wal")) if file.exists()]
            assert [log.read_bytes() for log in logs] == [damaged[1]]
            continue
        DB(path).close()  # the next start
        states.append("old" if emails(path) == ["bob@x.io"] else "new")
        assert problems(path) == []
        if states[-1] == "new":
            assert emails(path) == RESTORED
            assert content(path)["sessions"] == []
            if kind == "damaged":
                assert (kept.read_bytes(), Path(f"{kept}-wal").read_bytes()) == damaged
            else:
                assert emails(kept) == ["bob@x.io"]
    assert states == sorted(states, reverse=True)  # once it is the new one, it stays the new one
    assert set(states) == {"old", "new"}
    assert len(states) > 20


# Copies


def test_the_target_of_a_copy_gets_its_name_at_the_end(links: str, path: Path) -> None:
    with sqlite_files.open_target(str(path)):
        assert not path.exists()
    assert problems(path) == []
    assert mode_of(path) == 0o600
    with pytest.raises(DatabaseRefused, match="File exists"), sqlite_files.open_target(str(path)):
        pass


# Problems


def test_a_good_database_has_no_problems_and_is_not_changed(path: Path, backup: Path, first_release: Path) -> None:
    files = [fill(path, "bob@x.io"), backup, first_release]
    before = [file.read_bytes() for file in files]
    assert [problems(file) for file in files] == [[], [], []]
    assert [file.read_bytes() for file in files] == before


def test_a_check_moves_nothing_out_of_the_log_of_a_killed_process(tmp_path: Path) -> None:
    (folder := tmp_path / "left").mkdir()
    path = leave_log(folder / "authsvc.db", "bob@x.io")
    before = files_in(folder)
    assert problems(path) == []
    assert files_in(folder) == before


def test_a_database_in_use_has_no_problems(db: DB, path: Path) -> None:
    db.add_user("bob@x.io", HASH)
    assert problems(path) == []
    with db._engine.transaction() as writer:
        writer.execute("UPDATE users SET email = 'eve@x.io'")
        assert problems(path) == []


@pytest.mark.parametrize("kind", BAD_BACKUPS)
def test_a_bad_file_has_problems_and_is_not_changed(backup: Path, kind: str) -> None:
    damage, reason = BAD_BACKUPS[kind]
    damage(backup)
    before = files_in(backup.parent)
    found = problems(backup)
    assert found
    assert reason in found[0]
    assert files_in(backup.parent) == before


def test_an_index_without_one_of_its_rows_is_found(backup: Path) -> None:
    with closing(sqlite3.connect(backup, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("DELETE FROM sqlite_schema WHERE name = 'sessions_user_id'")
        connection.execute(f"PRAGMA user_version = {schema.SQLITE_VERSION}")
    with closing(sqlite3.connect(backup, isolation_level=None)) as connection:
        connection.execute("CREATE INDEX sessions_user_id ON sessions (user_id) WHERE user_id > 1")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_schema SET sql = 'CREATE INDEX sessions_user_id ON sessions (user_id)' "
            "WHERE name = 'sessions_user_id'"
        )
    assert any("sessions_user_id" in problem for problem in problems(backup))


def test_each_foreign_key_violation_is_named(path: Path) -> None:
    address = f"INSERT INTO known_addresses VALUES (1, 'address', {LAST_CHANGED})"
    run_sql(fill(path, "bob@x.io"), address, "DELETE FROM users")
    tables = "known_addresses", "sessions"
    assert sorted(problems(path)) == [f"foreign key violation in {table}" for table in tables]


def test_every_operation_on_a_file_says_that_sqlite_is_too_old(
    path: Path, folder: Path, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(path, "bob@x.io")
    before = files_in(path.parent)
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 99))
    reason = "it needs SQLite 3.37 or newer"
    operations: list[Callable[[], object]] = [
        lambda: DB(path),
        lambda: back_up(path, folder / "copy"),
        lambda: sqlite_files.open_readonly(str(path)).__enter__(),
        lambda: sqlite_files.open_source(str(path)).__enter__(),
        lambda: sqlite_files.open_target(str(folder / "new.db")).__enter__(),
        lambda: restore(backup, path, folder / "kept"),
    ]
    for operation in operations:
        with pytest.raises(DatabaseRefused, match=reason):
            operation()
    assert reason in problems(path)[0]
    assert files_in(path.parent) == before
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 37, 0))
    assert problems(path) == []


def test_a_folder_is_not_a_database(tmp_path: Path) -> None:
    assert len(problems(tmp_path)) == 1
