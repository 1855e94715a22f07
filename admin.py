"""The operator's commands: users, invitations, sessions, moving in and out, backups, checks.

They work on the database of the settings, beside a service that runs on it or without one, and take its locks. Each
change is one line in the log: on standard error, and in the system's log as ``authsvc``. No command reads, sets or is
told a password: a link lets its user choose one.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import sys
import syslog
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import IO, Any

import copying
import guard
import mailer
import moving
from auth import NO_PASSWORD, Auth, AuthError, UnknownEmail
from database import AlreadyExists, DatabaseRefused, StorageUnavailable
from settings import Settings, SettingsError, shown
from storage import CLOCK_TOLERANCE, Session, Store, User, engine, open_store

PROGRESS_STEP = 5000  # lines
PRUNE_REST = 0.02  # seconds between two steps, in which others write


class CommandFailed(Exception):
    """It could not be done; the message says why, and nothing was changed."""


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands to the program's parser."""
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--json", action="store_true", help="print JSON, one object a line")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Command, text: str, group: Any = commands) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = group.add_parser(
            name, parents=[shared], allow_abbrev=False, help=text, description=text
        )
        added.set_defaults(run=run)
        return added

    user = commands.add_parser("user", help="add, list, show, disable, enable, delete users")
    users = user.add_subparsers(required=True, metavar="COMMAND")
    command("add", _add, "Add a user, who has no password yet: see invite.", users).add_argument("email")
    command("list", _list, "List all users.", users)
    command("show", _show, "Show one user.", users).add_argument("email")
    command("disable", _disable, "Let a user in no more; end the sessions.", users).add_argument("email")
    command("enable", _enable, "Let a user in again.", users).add_argument("email")
    delete = command("delete", _delete, "Delete a user and all that is theirs.", users)
    delete.add_argument("email")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    text = "Print the link with which a user, who is added if need be, sets the first password; it lasts 7 days."
    command("invite", _invite, text).add_argument("email")
    text = "Print the link with which a user sets a new password; without a mail server, or when mail does not arrive."
    command("reset-link", _reset_link, text).add_argument("email")
    sessions = commands.add_parser("sessions", help="list and end sessions")
    session = sessions.add_subparsers(required=True, metavar="COMMAND")
    command("list", _sessions, "List a user's sessions.", session).add_argument("email")
    end = command("end", _end_sessions, "End a user's sessions, or everybody's with all links that are out.", session)
    whose = end.add_mutually_exclusive_group(required=True)
    whose.add_argument("email", nargs="?")
    whose.add_argument("--all", action="store_true", help="everybody's")
    text = "Switch off the second factor of a user who lost it; end the sessions."
    command("totp-off", _totp_off, text).add_argument("email")
    for name, run, text in (
        ("import", _import, "Add all users of a file, or none: CSV with a heading, JSON lines, htpasswd -B."),
        ("export", _export, "Write all users, with the hashes of their passwords, to a new file or standard output."),
    ):
        move = command(name, run, text)
        move.add_argument("file", nargs="?" if name == "export" else None)
        move.add_argument("--format", choices=moving.FORMATS.values(), help="instead of by the file's name")
    command("backup", _backup, "Copy the database to a new file, while it is used.").add_argument("file")
    text = "Put a backup in the place of the database, which is kept; end all sessions. Stop the service first."
    command("restore", _restore, text).add_argument("file")
    text = "Copy all, sessions too, to an empty database: a URL of PostgreSQL or a new file. Stop the service first."
    command("copy-to", _copy_to, text).add_argument("target")
    command("check", _check, "Say what is wrong with the database, the settings, the clock or the mail server.")
    command("prune", _prune, "Delete what is over, at once; the service does so by itself, bit by bit.")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run the command; return the exit code, 0 or 1."""
    try:
        with suppress(BrokenPipeError):  # whoever read the output has seen enough
            done: int | None = arguments.run(Operator(arguments, settings))
            sys.stdout.flush()
            return done or 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 0
    except (CommandFailed, moving.FormatUnknown, AuthError, DatabaseRefused, StorageUnavailable) as error:
        print(_plain(f"authsvc: {error}"), file=sys.stderr)
    except OSError as error:
        print(_plain(f"authsvc: {error.filename or arguments.command}: {error.strerror}"), file=sys.stderr)
    except KeyboardInterrupt:
        print("authsvc: interrupted, nothing was changed", file=sys.stderr)
    return 1


class Operator:
    """Who runs a command: the arguments and settings, the rules on the open database, and what is said and logged."""

    def __init__(self, arguments: argparse.Namespace, settings: Settings) -> None:
        self.arguments = arguments
        self.settings = settings

    @contextmanager
    def opened(self) -> Iterator[tuple[Auth, Store]]:
        """Open the database, which must be there: a forgotten setting must not make another one."""
        self.check_there()
        with closing(open_store(self.settings.database, private=self.settings.production)) as db:
            yield Auth(db, self.settings), db

    def check_there(self) -> None:
        """Refuse to go on without a database."""
        place = self.settings.database
        if not engine(place).is_there(place):
            place = shown(place)
            raise CommandFailed(
                f"there is no database {place}: start the service once, or set AUTHSVC_DATABASE as for the service"
            )

    @contextmanager
    def user(self) -> Iterator[tuple[Auth, Store, User]]:
        """Open the database and find the user that the arguments name."""
        with self.opened() as (auth, db):
            yield auth, db, auth.find_user(self.arguments.email)

    def say(self, text: str, **record: Any) -> None:
        """Print the text; with --json the record."""
        print(json.dumps(record) if self.arguments.json else _plain(text))

    def log(self, event: str, **details: Any) -> None:
        """Log what was done, and by whom."""
        who = _login_name()
        guard.log(event, operator=who, **details)
        syslog.openlog("authsvc", 0, syslog.LOG_AUTH)  # standard error is not kept when a person types
        syslog.syslog(json.dumps({"event": event, "operator": who, **details}))


Command = Callable[[Operator], int | None]


# Users


def _add(operator: Operator) -> None:
    with operator.opened() as (auth, _):
        user = auth.add_account(operator.arguments.email)
        operator.log("user_created", user_id=user.id)
        operator.say(f"added {user.email}; {user.email} can be invited now", **_record(user))


def _list(operator: Operator) -> None:
    with operator.opened() as (_, db):
        for user in db.each_user():
            record = _record(user)
            factor = "2fa" if user.totp_since else "-"
            operator.say(f"{user.id:>7}  {record['state']:<8}  {factor:<3}  {user.email}", **record)


def _show(operator: Operator) -> None:
    with operator.user() as (auth, _, user):
        sessions = auth.sessions_of(user.id)
        record = _record(user) | {"sessions": len(sessions)}
        operator.say("\n".join(f"{name:<14}{_shown(value)}" for name, value in record.items()), **record)


def _disable(operator: Operator) -> None:
    with operator.user() as (_, db, user):
        db.disable_user(user.id, int(time.time()))
        operator.log("user_disabled", user_id=user.id)
        operator.say(f"disabled {user.email}; all sessions have ended", email=user.email, state="disabled")


def _enable(operator: Operator) -> None:
    with operator.user() as (_, db, user):
        db.enable_user(user.id)
        operator.log("user_enabled", user_id=user.id)
        operator.say(f"enabled {user.email}", email=user.email, state="active")


def _delete(operator: Operator) -> None:
    with operator.user() as (_, db, user):
        if not operator.arguments.yes:
            if not sys.stdin.isatty():
                raise CommandFailed("give --yes to delete without being asked")
            if input(f"Delete {user.email} and all that is theirs? [y/N] ").strip().lower() not in ("y", "yes"):
                raise CommandFailed("not deleted")
        db.delete_user(user.id)
        operator.log("user_deleted", user_id=user.id)
        operator.say(f"deleted {user.email}", email=user.email, state="deleted")


def _invite(operator: Operator) -> None:
    if operator.settings.registration == "closed":
        raise CommandFailed("AUTHSVC_REGISTRATION=closed: nobody is invited")
    with operator.opened() as (auth, _):
        try:
            user = auth.find_user(operator.arguments.email)
        except UnknownEmail:
            user = auth.add_account(operator.arguments.email)
            operator.log("user_created", user_id=user.id)
        if user.hashed_password != NO_PASSWORD:
            raise CommandFailed(f"{user.email} has a password: use reset-link")
        _say_link(operator, auth, user)
        operator.log("user_invited", user_id=user.id)


def _reset_link(operator: Operator) -> None:
    with operator.user() as (auth, _, user):
        _say_link(operator, auth, user)
        operator.log("authn_reset_token_created", user_id=user.id)


def _say_link(operator: Operator, auth: Auth, user: User) -> None:
    if user.disabled_at:
        raise CommandFailed(f"{user.email} is disabled: enable first")
    token, expires_at = auth.link_token(user)
    link = mailer.reset_link(operator.settings.public_url or f"http://{operator.settings.listen}", user.email, token)
    operator.say(link, email=user.email, link=link, reset_token=token, expires=guard.timestamp(expires_at))


def _totp_off(operator: Operator) -> None:
    with operator.user() as (_, db, user):
        if not db.remove_totp(user.id):
            raise CommandFailed(f"{user.email} has no second factor")
        operator.log("authn_factor_removed", user_id=user.id)
        text = f"switched off the second factor of {user.email}; all sessions have ended"
        operator.say(text, email=user.email, second_factor=False)


# Sessions


def _sessions(operator: Operator) -> None:
    with operator.user() as (auth, _, user):
        for session in auth.sessions_of(user.id):
            record = session_record(auth, session)
            operator.say("  ".join(map(_shown, record.values())), **record)


def session_record(auth: Auth, session: Session) -> dict[str, Any]:
    """Return what is told of a session, to the operator and to whose it is."""
    return {
        "id": session.id,
        "created": guard.timestamp(session.created_at),
        "last_seen": guard.timestamp(session.last_seen_at),
        "expires": guard.timestamp(auth.expires_at(session)),
        "address": session.address,
        "user_agent": session.user_agent,
    }


def _end_sessions(operator: Operator) -> None:
    if operator.arguments.all:
        with operator.opened() as (_, db):
            ended = db.end_all_sessions()
            operator.log("session_ended", which="all")
    else:
        with operator.user() as (_, db, user):
            ended = db.end_sessions(user.id)
            operator.log("session_ended", user_id=user.id)
    operator.say(f"{ended} sessions ended", ended=ended)


# Moving in and out


def _import(operator: Operator) -> None:
    path = operator.arguments.file
    form = moving.format_of(path, operator.arguments.format)
    faults: dict[int, str] = {}
    with open(path, "rb") as file, operator.opened() as (auth, db):

        def accounts() -> Iterator[tuple[int, User]]:
            for line, record in _progress(moving.records(file, form), file):
                try:
                    yield line, moving.account(record, auth.check_email, int(time.time()))
                except ValueError as error:
                    faults[line] = str(error)

        faults |= dict.fromkeys(db.stage_users(accounts()), "email already registered, or twice in this file")
        if faults:
            print(*(f"{path}:{line}: {faults[line]}" for line in sorted(faults)), sep="\n", file=sys.stderr)
            raise CommandFailed(f"{len(faults)} faults, nothing was imported")
        imported = db.add_staged_users()
    operator.log("users_imported", users=imported)
    operator.say(f"{imported} users imported", imported=imported)


def _export(operator: Operator) -> None:
    path = operator.arguments.file
    form = moving.format_of(path or ".csv", operator.arguments.format)
    with operator.opened() as (_, db), _output(path) as file:
        exported, left_out = moving.write(db.each_user(), file, form)
    operator.log("users_exported", users=exported)
    if path:
        operator.say(f"{exported} users exported", exported=exported, left_out=left_out)
    if left_out:
        print(f"authsvc: {left_out} users cannot stand in a {form} file and were left out", file=sys.stderr)


def _progress(records: Iterable[Any], file: IO[bytes]) -> Iterator[Any]:
    shown = sys.stderr.isatty()
    size = max(1, os.fstat(file.fileno()).st_size)
    for number, record in enumerate(records):
        if shown and number % PROGRESS_STEP == 0:
            done = min(40, file.tell() * 40 // size)
            print(f"\r[{'#' * done:<40}] {number} users", end="", file=sys.stderr, flush=True)
        yield record
    if shown:
        print("\r" + " " * 64, end="\r", file=sys.stderr)


@contextmanager
def _output(path: str | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(file, "w", encoding="utf-8", newline="") as stream:
            yield stream
    except BaseException:
        os.unlink(path)
        raise


# The file


def _backup(operator: Operator) -> None:
    path, place = operator.arguments.file, operator.settings.database
    engine(place).backup(place, path)
    operator.log("sys_backup")
    operator.say(f"backed up to {path}", file=path, bytes=os.path.getsize(path))


def _restore(operator: Operator) -> None:
    path = operator.settings.database
    former = f"{path}.{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    ended = 0

    def prepare(copy: str) -> None:
        nonlocal ended
        with closing(open_store(copy)) as db:
            ended = db.end_all_sessions()  # some of them were ended since, by people who had a reason

    replaced = engine(path).restore(operator.arguments.file, path, former, prepare)
    operator.log("sys_restore")
    kept = f"; what was there is kept as {former}" if replaced else ""
    record = {"database": path, "kept": former if replaced else None, "sessions_ended": ended}
    operator.say(f"restored {path}; {ended} sessions ended{kept}", **record)


def _copy_to(operator: Operator) -> None:
    source, target = operator.settings.database, operator.arguments.target
    replace(operator.settings, database=target)  # refuses what could not be served
    operator.check_there()
    try:
        with engine(target).arriving(target) as arriving, engine(source).leaving(source) as leaving:
            counts = copying.copy(leaving, arriving, _tell)
    except (copying.CopyRefused, AlreadyExists, ValueError) as error:
        raise CommandFailed(f"{shown(target)}: {error}; nothing was copied") from None
    finally:
        _tell("", 0)
    operator.log("sys_copy", target=shown(target), users=counts["users"])
    listed = ", ".join(f"{rows} {table.replace('_', ' ')}" for table, rows in counts.items())
    text = f"copied to {shown(target)} and verified: {listed}\n"
    text += f"start the service with it as AUTHSVC_DATABASE, and not with {shown(source)} any more"
    operator.say(text, target=shown(target), **counts)


def _tell(what: str, rows: int) -> None:
    if rows % PROGRESS_STEP == 0 and sys.stderr.isatty():
        print(f"\r{f'{what}: {rows} rows' if what else '':<64}", end="" if what else "\r", file=sys.stderr, flush=True)


def _check(operator: Operator) -> int:
    settings = operator.settings
    found = engine(settings.database).check(settings.database)
    found |= {
        "settings": settings.warnings(),
        "clock": _clock_problems(settings, found["database"]),
        "mail": _mail_problems(settings),
    }
    for name, problems in found.items():
        operator.say(f"{name:<10}{'; '.join(problems) or 'ok'}", check=name, ok=not problems, problems=problems)
    return 1 if any(found.values()) else 0


def _clock_problems(settings: Settings, faults: list[str]) -> list[str]:
    if faults:
        return ["unknown without a database"]
    ahead = engine(settings.database).newest_time(settings.database) - int(time.time())
    return [f"the last session is {ahead} s in the future: was the clock set back?"] if ahead > CLOCK_TOLERANCE else []


def _mail_problems(settings: Settings) -> list[str]:
    if not settings.smtp_url:
        return []
    try:
        mailer.Mailer(settings, guard.log).check()
    except (OSError, SettingsError) as error:  # an SMTPException is an OSError
        return [f"{settings.smtp_server.hostname if settings.smtp_server else ''}: {error}"]
    return []


def _prune(operator: Operator) -> None:
    with operator.opened() as (auth, _):
        while auth.prune():
            time.sleep(PRUNE_REST)
    operator.log("sys_prune")
    operator.say("pruned", pruned=True)


# Details


def _login_name() -> str:
    # Not from the environment, which anybody can set.
    try:
        return os.getlogin()  # who logged in, also under sudo
    except OSError:  # no terminal: a timer, a container
        pass
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _plain(text: str) -> str:
    # A user agent, a name in a file: what strangers wrote must not reach the terminal as a command.
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _record(user: User) -> dict[str, Any]:
    state = "disabled" if user.disabled_at else "invited" if user.hashed_password == NO_PASSWORD else "active"
    created = guard.timestamp(user.created_at) if user.created_at else None
    factor = user.totp_since is not None
    return {"id": user.id, "email": user.email, "state": state, "created": created, "second_factor": factor}


def _shown(value: object) -> str:
    return {None: "-", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
