"""The operator's commands: users, groups, sessions, links, imports and exports, backups and checks.

A command uses the database of the settings, and takes its locks, so it may run beside the service. Each change is
logged on standard error and in syslog as ``authsvc``. No command reads, sets or prints a password: the operator passes
on a link, and the user chooses the password.
"""

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import IO, Any, NoReturn

import log
from auth import NO_PASSWORD, Auth, AuthError, UnknownEmail, describe_token
from cli import user_files
from cli.copy import CopyRefused, copy
from cli.operator import CommandFailed, Operator, printable, user_name
from engines import operations
from engines.errors import AlreadyExists, DatabaseRefused, StorageUnavailable
from log import log_event, timestamp
from mail import Mailer, token_link
from settings import NO_METRICS, Settings, SettingsError, redacted
from storage import DB, EXPIRED, User, newest_session_time
from tables.rate_limits import CLOCK_TOLERANCE

PROGRESS_STEP = 5000  # rows between two updates of the progress display
PRUNE_PAUSE = 0.02  # seconds between two steps of deleting, in which other writers get the lock
REFUSALS = CommandFailed, user_files.UnknownFormat, AuthError, AlreadyExists, DatabaseRefused, StorageUnavailable


# The command line


class Parser(argparse.ArgumentParser):
    """A parser whose messages show no URL or connection string, which may contain a password."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"\S*(?:[@=/]|:\S).*", "…", message, flags=re.DOTALL))


def new_parser(program: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return the parser of the program's options and of all commands."""
    parser = Parser(prog=program, description=description, epilog=epilog)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    groups = {"": parser.add_subparsers(dest="command", metavar="COMMAND")}
    for name in GROUPS:
        verbs = ", ".join(names.split()[1] for names, *_ in COMMANDS if names.startswith(f"{name} "))
        groups[name] = groups[""].add_parser(name, help=verbs).add_subparsers(required=True, metavar="COMMAND")
    for names, run, argument in COMMANDS:
        group, _, name = names.rpartition(" ")
        command = groups[group].add_parser(name, allow_abbrev=False, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print JSON, one object per line")
        target: Any = command
        if names == "sessions end":
            target = command.add_mutually_exclusive_group(required=True)
            target.add_argument("--all", action="store_true", help="end the sessions of all users")
        kind = _utf_8 if "email" in argument else _KINDS.get(names, str)
        for one in argument.split():
            target.add_argument(one.strip("[]"), nargs="?" if one.startswith("[") else None, type=kind)
        if names == "user delete":
            command.add_argument("--yes", action="store_true", help="do not ask for confirmation")
        if names in ("import", "export"):
            formats = dict.fromkeys(user_files.FORMATS.values())
            command.add_argument("--format", choices=formats, help="default: by the file's name")
        if names == "import":
            command.add_argument("--cut-at-72", action="store_true", help="passwords were cut at 72 bytes to hash them")
    return parser


def _database(text: str) -> str:
    if text in ("", "-"):
        raise argparse.ArgumentTypeError("name a file: a database is no stream" if text else "name a file")
    return text


def _file(text: str) -> str:
    if not text or re.search("://|:.*@|password *=", text):  # not shown: it may contain a password
        raise argparse.ArgumentTypeError("name a file: this is a URL or a connection string" if text else "name a file")
    return text


def _database_file(text: str) -> str:
    return _file(_database(text))


_KINDS = {"backup": _database_file, "restore": _database_file, "copy-to": _database, "import": _file, "export": _file}


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run the command that was parsed; return the exit code, 0 or 1."""
    log.direct = True
    try:
        with suppress(BrokenPipeError):  # the reader of the output has closed it, as "head" does
            code: int | None = arguments.run(Operator(arguments, settings))
            sys.stdout.flush()
            return code or 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would report the closed pipe at exit
        return 0
    except REFUSALS as error:
        text = f"{error}{_remedy(error.__cause__, arguments, settings)}"
    except OSError as error:  # if it is of the output, the command itself may be done
        text = f"{error.filename or 'cannot write the output'}: {error.strerror}{_remedy(error, arguments, settings)}"
    except KeyboardInterrupt:
        text = "interrupted"
    print(printable(f"authsvc: {text}"), file=sys.stderr)
    return 1


def _remedy(error: BaseException | None, arguments: argparse.Namespace, settings: Settings) -> str:
    """Return what to do about a missing permission; "" for any other error."""
    if not isinstance(error, PermissionError):
        return ""
    remedy = "run it as the user of the service"
    if getattr(arguments, "file", None) or getattr(arguments, "target", None):
        place = os.path.dirname(os.path.abspath(settings.database)) if os.path.exists(settings.database) else ""
        remedy = f"use a file and a folder that this user may read and write{place and f', such as {place}'}"
        remedy += ', or "-" for standard input or output' if arguments.command in ("import", "export") else ""
    return f": this command runs as the user {user_name()}: {remedy}"


# Users


def _add_user(operator: Operator) -> None:
    """Add a user without a password; "invite" prints the link to set one."""
    with operator.open_database() as (auth, _):
        user = auth.add_account(operator.arguments.email)
        operator.log("user_created", user_id=user.id)
        operator.print_record(f"added {user.email}; next: invite {user.email}", **_user_record(user))


def _list_users(operator: Operator) -> None:
    """List all users."""
    with operator.open_database() as (_, db):
        for user in db.each_user():
            record = _user_record(user)
            factor = "2fa" if user.totp_since else "-"
            operator.print_record(f"{user.id:>7}  {record['state']:<8}  {factor:<3}  {user.email}", **record)


def _show_user(operator: Operator) -> None:
    """Show one user."""
    with operator.open_user() as (auth, _, user):
        counts = {"passkeys": len(auth.passkeys_of(user.id)), "sessions": len(auth.sessions_of(user.id))}
        record = _user_record(user) | counts | {"access_tokens": len(auth.tokens_of(user.id))}
        operator.print_record("\n".join(f"{name:<14}{_format(value)}" for name, value in record.items()), **record)


def _disable_user(operator: Operator) -> None:
    """Disable a user and end their sessions."""
    with operator.open_user() as (_, db, user):
        db.disable_user(user.id, int(time.time()))
        operator.log("user_disabled", user_id=user.id)
        operator.print_record(f"disabled {user.email}; all sessions ended", email=user.email, state="disabled")


def _enable_user(operator: Operator) -> None:
    """Enable a disabled user."""
    with operator.open_user() as (_, db, user):
        db.enable_user(user.id)
        operator.log("user_enabled", user_id=user.id)
        operator.print_record(f"enabled {user.email}", email=user.email, state="active")


def _delete_user(operator: Operator) -> None:
    """Delete a user and all their data."""
    with operator.open_user() as (auth, db, user):
        if not operator.arguments.yes:
            _confirm(f"Delete {user.email} and all their data? [y/N] ")
        db.delete_user(user.id, auth.reserved_at())
        operator.log("user_deleted", user_id=user.id)
        with suppress(StorageUnavailable):  # the service does it, too, within the hour
            db.empty_log()
        operator.print_record(f"deleted {user.email}", email=user.email, state="deleted")


def _rename_user(operator: Operator) -> None:
    """Change a user's email, and end their sessions, reset links and invitations."""
    with operator.open_user() as (auth, _, user):
        auth.rename(user, operator.arguments.new_email)
        operator.log("user_updated", user_id=user.id, changed="email")
        text = f"renamed {user.email} to {operator.arguments.new_email}; all sessions ended"
        operator.print_record(text, email=operator.arguments.new_email, former_email=user.email)


def _release_email(operator: Operator) -> None:
    """Free an email that a user gave up less than 90 days ago."""
    email = operator.arguments.email
    with operator.open_database() as (auth, db):
        if not db.emails.release(email):
            raise CommandFailed(f"{email} is not reserved")
        operator.log("email_released", unknown=auth.tag(email))
        operator.print_record(f"released {email}", email=email, state="released")


def _add_to_group(operator: Operator) -> None:
    """Add a user to a group, which may use the applications whose proxy asks for it."""
    _change_groups(operator, member=True)


def _remove_from_group(operator: Operator) -> None:
    """Remove a user from a group."""
    _change_groups(operator, member=False)


def _change_groups(operator: Operator, *, member: bool) -> None:
    group = operator.arguments.group
    with operator.open_user() as (auth, _, user):
        if changed := auth.change_groups(user, group, member=member):
            operator.log("user_updated", user_id=user.id, changed="groups")
        verb = ("added to" if member else "removed from") if changed else "already in" if member else "not in"
        operator.print_record(f"{user.email}: {verb} {group}", group=group, email=user.email, member=member)


def _list_groups(operator: Operator) -> None:
    """List all groups with their members, or the groups of one user."""
    email = operator.arguments.email
    with operator.open_database() as (auth, db):
        users = [auth.find_user(email)] if email else db.each_user()
        for group, member in sorted((group, user.email) for user in users for group in user.group_names):
            operator.print_record(f"{group}  {member}", group=group, email=member)


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise CommandFailed("cannot ask for confirmation without a terminal: add --yes")
    with suppress(EOFError):  # Ctrl-D
        if input(printable(question)).strip().lower() in ("y", "yes"):
            return
    raise CommandFailed("not confirmed; nothing was deleted")


def _user_record(user: User) -> dict[str, Any]:
    return {
        "id": user.id,
        "email": user.email,
        "state": "disabled" if user.disabled_at else "invited" if user.hashed_password == NO_PASSWORD else "active",
        "created": timestamp(user.created_at) if user.created_at else None,
        "second_factor": user.totp_since is not None,
        "groups": " ".join(user.group_names) or None,
    }


# Credentials


def _invite(operator: Operator) -> None:
    """Print a link, valid for 7 days, to set a first password; adds the user if needed."""
    if operator.settings.registration == "closed":
        raise CommandFailed("AUTHSVC_REGISTRATION=closed allows no invitations: set it to invitation or open")
    base = _link_base(operator.settings)
    with operator.open_database() as (auth, _):
        try:
            user = auth.find_user(operator.arguments.email)
        except UnknownEmail:
            user = auth.add_account(operator.arguments.email)
            operator.log("user_created", user_id=user.id)
        if user.hashed_password != NO_PASSWORD:
            raise CommandFailed(f"{user.email} already has a password: use reset-link")
        _print_link(operator, auth, user, base, invited=True)


def _print_reset_link(operator: Operator) -> None:
    """Print a link to set a new password, for when mail does not arrive."""
    with operator.open_user() as (auth, _, user):
        _print_link(operator, auth, user, _link_base(operator.settings), invited=False)


def _link_base(settings: Settings) -> str:
    """Return the beginning of links: an address that a browser can open."""
    host, port = settings.address
    if not settings.production and (host.is_unspecified or not port):
        raise CommandFailed(f"no browser can open AUTHSVC_LISTEN={settings.listen}: set AUTHSVC_PUBLIC_URL")
    return settings.base_url


def _print_link(operator: Operator, auth: Auth, user: User, base: str, *, invited: bool) -> None:
    if user.disabled_at:
        raise CommandFailed(f"{user.email} is disabled: enable the user first")
    token, expires_at = auth.link_token(user)
    link = token_link(base, "reset", user.email, token)
    # Before the link is printed, as that may fail.
    operator.log("user_invited" if invited else "authn_reset_token_created", user_id=user.id)
    operator.print_record(link, email=user.email, link=link, reset_token=token, expires=timestamp(expires_at))


def _disable_totp(operator: Operator) -> None:
    """Disable two-factor authentication for a user, and end their sessions."""
    with operator.open_user() as (_, db, user):
        if not db.remove_totp(user.id):
            raise CommandFailed(f"{user.email} does not use two-factor authentication")
        operator.log("authn_factor_removed", user_id=user.id)
        text = f"disabled two-factor authentication for {user.email}; all sessions ended"
        operator.print_record(text, email=user.email, second_factor=False)


def _delete_passkeys(operator: Operator) -> None:
    """Delete all passkeys of a user, and end their sessions."""
    with operator.open_user() as (_, db, user):
        deleted = db.delete_passkeys(user.id)
        if not deleted:
            raise CommandFailed(f"{user.email} has no passkeys")
        operator.log("authn_factor_removed", user_id=user.id, passkeys=deleted)
        text = f"deleted {_count(deleted, 'passkey')} of {user.email}; all sessions ended"
        operator.print_record(text, email=user.email, passkeys_deleted=deleted)


# Sessions


def _list_sessions(operator: Operator) -> None:
    """List the sessions of a user."""
    with operator.open_user() as (auth, _, user):
        _print_rows(operator, map(auth.describe_session, auth.sessions_of(user.id)))


def _print_rows(operator: Operator, records: Iterable[Mapping[str, str | None]]) -> None:
    for record in records:
        operator.print_record("  ".join(map(_format, record.values())), **record)


def _list_tokens(operator: Operator) -> None:
    """List the access tokens of a user: id, name, and when each was created, was last used and expires."""
    with operator.open_user() as (auth, _, user):
        _print_rows(operator, map(describe_token, auth.tokens_of(user.id)))


def _delete_token(operator: Operator) -> None:
    """Delete an access token of a user, by the id that "token list" shows."""
    token_id = operator.arguments.id
    with operator.open_user() as (auth, _, user):
        auth.delete_token(user, token_id)
        operator.log("authn_token_revoked", user_id=user.id, token=int(token_id))
        operator.print_record(f"{user.email}: deleted access token {token_id}", email=user.email, id=token_id)


def _end_sessions(operator: Operator) -> None:
    """End a user's sessions; --all: all sessions, and all links that were mailed or printed."""
    if operator.arguments.all:
        with operator.open_database() as (_, db):
            ended = db.end_all_sessions()
            operator.log("session_ended", which="all")
    else:
        with operator.open_user() as (_, db, user):
            ended = {"sessions": db.end_sessions(user.id, devices=True)}
            operator.log("session_ended", user_id=user.id)
    operator.print_record(_ended(**ended), ended=ended.pop("sessions"), **ended)


def _ended(sessions: int, **deleted: int) -> str:
    listed = "".join(f"; {name.replace('_', ' ')} deleted: {number}" for name, number in deleted.items())
    return f"{_count(sessions, 'session')} ended{listed}"


# Import and export


def _import_users(operator: Operator) -> None:
    """Add all users in a file ("-": standard input), or none. Reads CSV with a header, JSON lines and htpasswd -B."""
    path = operator.arguments.file
    form = user_files.detect_format(".csv" if path == "-" else path, operator.arguments.format)
    problems: dict[int, str] = {}
    users: dict[str, tuple[int, User]] = {}  # with their lines, by email in folded letter case
    now = int(time.time())
    with _open_input(path) as file, operator.open_database() as (auth, db):
        for line, record in _with_progress(f"reading {path}", user_files.read_records(file, form)):
            try:
                user = user_files.parse_user(record, auth.check_email, now, cut_at_72=operator.arguments.cut_at_72)
            except ValueError as error:
                problems[line] = str(error)
                continue
            if users.setdefault(user.email.casefold(), (line, user))[0] != line:
                problems[line] = _taken(user.email)
        problems |= {line: _taken(user.email) for line, user in map(users.__getitem__, db.taken_emails(list(users)))}
        if not problems:
            db.import_users(user for _, user in users.values())
    for line in sorted(problems):
        print(printable(f"{path}:{line}: {problems[line]}"), file=sys.stderr)
    if problems:
        raise CommandFailed(f"{_count(len(problems), 'problem')}: nothing was imported")
    operator.log("users_imported", users=len(users))
    operator.print_record(f"{_count(len(users), 'user')} imported", imported=len(users))
    if waiting := sum(user.hashed_password == NO_PASSWORD for _, user in users.values()):
        print(f"authsvc: {_count(waiting, 'user')} without a password; next: invite each", file=sys.stderr)


def _taken(email: str) -> str:
    return f"{user_files.named('email', email)}: already registered, reserved, or repeated in this file"


def _export_users(operator: Operator) -> None:
    """Write all users, with password hashes and TOTP seeds, to a new file or standard output ("-")."""
    path = None if operator.arguments.file in ("-", "/dev/stdout") else operator.arguments.file
    form = user_files.detect_format(path or ".csv", operator.arguments.format)
    counts = {True: 0, False: 0}
    try:
        with operator.open_database() as (_, db), _open_output(path) as file:
            for written in user_files.write_users(db.each_user(), file, form):
                counts[written] += 1
            passkeys = db.passkeys.count()
    except BaseException:
        if counts[True] and not path:  # the reader closed the pipe, for example, and has some of the users
            operator.log("users_exported", users=counts[True], complete=False)
        raise
    exported, left_out = counts[True], counts[False]
    operator.log("users_exported", users=exported)
    if path:
        record = {"exported": exported, "left_out": left_out, "passkeys_left_out": passkeys}
        operator.print_record(f"{_count(exported, 'user')} exported", **record)
    if left_out:
        print(f"authsvc: left out {_count(left_out, 'user')} that {form} cannot represent", file=sys.stderr)
    if passkeys:
        print(f"authsvc: left out {_count(passkeys, 'passkey')}: only backup and copy-to keep them", file=sys.stderr)


def _with_progress(step: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows, and show at a terminal how many of them are done."""
    for number, row in enumerate(rows):
        if number % PROGRESS_STEP == 0 and sys.stderr.isatty():
            print(f"\r{step}: {_count(number, 'row')}".ljust(65), end="", file=sys.stderr, flush=True)
        yield row
    _clear_progress()


def _clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r" + " " * 64, end="\r", file=sys.stderr, flush=True)


def _open_input(path: str) -> io.BufferedReader:
    # A pipe belongs to the person who typed the command. Under a name such as /dev/fd/63, which a shell gives to <(…),
    # the service's user could not open it; the descriptor is open already.
    stream = re.fullmatch("-|/dev/stdin|/dev/fd/([0-9]{1,9})", path)
    try:
        return open(int(stream[1] or 0) if stream else path, "rb", closefd=not stream)
    except OSError as error:
        if not stream:
            raise
        remedy = 'pipe the users to "import -" (sudo closes all other descriptors)'
        raise CommandFailed(f"{path}: {error.strerror}: {remedy}") from None


@contextmanager
def _open_output(path: str | None) -> Iterator[IO[str]]:
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="strict")
        yield sys.stdout
        sys.stdout.flush()
        return
    # The file holds password hashes: only its owner may read it, and it replaces no existing file.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            yield file
    except BaseException:
        os.unlink(path)
        raise


# The database


def _backup(operator: Operator) -> None:
    """Copy the database to a new file. The service may be running."""
    path, database = operator.arguments.file, operator.settings.database
    operator.require_database()
    operations(database).backup(database, path)
    operator.log("sys_backup")
    operator.print_record(f"backed up to {path}", file=path, bytes=os.path.getsize(path))


def _restore(operator: Operator) -> None:
    """Replace the database with a backup and end all sessions. Stop the service first."""
    source, database = operator.arguments.file, operator.settings.database
    # Beside the file itself: a symbolic link to it may be on another file system.
    file = os.path.realpath(database) if os.path.islink(database) else database
    kept = f"{file}.{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    rows = {"sessions": 0}

    def prepare(path: str) -> None:
        with closing(DB(path)) as db:
            # The backup still holds sessions that were ended after it was made, perhaps because they were stolen.
            rows.update(db.end_all_sessions())

    try:
        replaced = operations(database).restore(source, database, kept, prepare)
    except DatabaseRefused:
        with suppress(FileNotFoundError):
            os.close(os.open(source, os.O_RDONLY))  # raises PermissionError where SQLite gives no reason
        raise
    operator.log("sys_restore")
    text = f"restored {database}; {_ended(**rows)}"
    record = {"database": database, "kept": kept if replaced else None, "sessions_ended": rows.pop("sessions"), **rows}
    operator.print_record(f"{text}; the old database is now {kept}" if replaced else text, **record)


def _copy_to(operator: Operator) -> None:
    """Copy all rows to an empty database: PostgreSQL or a file. Stop the service first."""
    source = operator.settings.database
    # Raises SettingsError for a target that the service could not use.
    target = replace(operator.settings, database=operator.arguments.target).database
    operator.require_database()
    try:
        with operations(target).open_target(target) as copied, operations(source).open_source(source) as rows:
            counts = copy(rows, copied, _with_progress)
    except (CopyRefused, AlreadyExists, ValueError) as error:
        raise CommandFailed(f"{redacted(target)}: {error}; nothing was copied") from None
    finally:
        _clear_progress()
    operator.log("sys_copy", target=redacted(target), users=counts["users"])
    listed = ", ".join(f"{table} {rows}" for table, rows in counts.items())
    text = f"copied to {redacted(target)} and verified; rows copied: {listed}\n"
    text += f"next: set AUTHSVC_DATABASE to it and start the service; do not use {redacted(source)} any more"
    operator.print_record(text, target=redacted(target), **counts)


def _check(operator: Operator) -> int:
    """Check the database, the settings, the clock and the mail server."""
    settings = operator.settings
    found = operations(settings.database).check(settings.database)
    found |= {"settings": list(settings.warnings()), "clock": _clock_problems(settings, found["database"])}
    found["mail"] = _mail_problems(settings)
    found["metrics"] = [NO_METRICS] if settings.metrics_listen and not find_spec("prometheus_client") else []
    set_up = {"mail": settings.smtp_url, "metrics": settings.metrics_listen}
    for name, problems in found.items():
        state = "failed" if problems else "ok" if set_up.get(name, True) else "not set up"
        text = f"{name:<10}{'; '.join(problems) or state}"
        operator.print_record(text, check=name, ok=not problems, state=state, problems=problems)
    return 1 if any(found.values()) else 0


def _clock_problems(settings: Settings, database_problems: list[str]) -> list[str]:
    if database_problems:
        return ["not checked: the database cannot be read"]
    ahead = newest_session_time(settings.database) - int(time.time())
    text = f"the last session is {ahead} s in the future: check whether the clock was set back"
    return [text] if ahead > CLOCK_TOLERANCE else []


def _mail_problems(settings: Settings) -> list[str]:
    try:
        if settings.smtp_url:
            Mailer(settings, log_event).check()
    except SettingsError as error:
        return [str(error)]
    except OSError as error:  # smtplib's SMTPException is an OSError
        return [f"{settings.smtp_server.hostname if settings.smtp_server else ''}: {error}"]
    return []


def _prune(operator: Operator) -> None:
    """Delete expired rows now. The service also does this every hour."""
    deleted = {"sessions": 0, "reset_tokens": 0, **dict.fromkeys(EXPIRED, 0), "buckets": 0}
    with operator.open_database() as (auth, _):
        for kind, number in auth.prune():
            deleted[kind] += number
            time.sleep(PRUNE_PAUSE)
        auth.empty_log()
    operator.log("sys_prune", **deleted)
    listed = ", ".join(f"{kind} {number}" for kind, number in deleted.items()).replace("_", " ")
    operator.print_record(f"deleted: {listed}", pruned=True, **deleted)


# Input and output


def _utf_8(text: str) -> str:
    """Return an argument that was typed in UTF-8, or else in the encoding of the locale.

    Raises:
        ValueError: it is neither.
    """
    with suppress(UnicodeDecodeError):
        return os.fsencode(text).decode()
    return text.encode().decode()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _format(value: object) -> str:
    return {None: "-", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


# All commands: name, function, argument. A new one is a function above, with its help text as the docstring, and a row
# here; options are added in new_parser(). Brackets mark an argument that may be left out.

GROUPS = "user", "group", "sessions", "token"  # the first words of commands of two words

COMMANDS: tuple[tuple[str, Callable[[Operator], int | None], str], ...] = (
    ("user list", _list_users, ""),
    ("user add", _add_user, "email"),
    ("user show", _show_user, "email"),
    ("user disable", _disable_user, "email"),
    ("user enable", _enable_user, "email"),
    ("user delete", _delete_user, "email"),
    ("user rename", _rename_user, "email new_email"),
    ("user release", _release_email, "email"),
    ("group add", _add_to_group, "email group"),
    ("group remove", _remove_from_group, "email group"),
    ("group list", _list_groups, "[email]"),
    ("invite", _invite, "email"),
    ("reset-link", _print_reset_link, "email"),
    ("totp-off", _disable_totp, "email"),
    ("passkeys-off", _delete_passkeys, "email"),
    ("sessions list", _list_sessions, "email"),
    ("sessions end", _end_sessions, "[email]"),
    ("token list", _list_tokens, "email"),
    ("token delete", _delete_token, "email id"),
    ("import", _import_users, "file"),
    ("export", _export_users, "[file]"),
    ("backup", _backup, "file"),
    ("restore", _restore, "file"),
    ("copy-to", _copy_to, "target"),
    ("check", _check, ""),
    ("prune", _prune, ""),
)
