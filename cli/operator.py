"""What every command works with: the operator who runs it, the database, the output and the log.

The commands themselves are in cli/commands.py.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from auth import Auth
from engines import operations
from log import log_event
from settings import Settings, redacted
from storage import DB, User

with suppress(ImportError):  # the settings say that Windows, which lacks them, is not supported
    import pwd
    import syslog


class CommandFailed(Exception):
    """The command changed nothing; the message gives the reason."""


class Operator:
    """What a command works with: its arguments, the settings, the database, the output and the log."""

    def __init__(self, arguments: argparse.Namespace, settings: Settings) -> None:
        self.arguments, self.settings = arguments, settings

    def require_database(self) -> None:
        """Raise CommandFailed if there is no database. Opening it would create one, perhaps in the wrong place."""
        database = self.settings.database
        if not operations(database).exists(database):
            remedy = "start the service once to create it, or set AUTHSVC_DATABASE to the service's value"
            raise CommandFailed(f"there is no database {redacted(database)}: {remedy}")

    @contextmanager
    def open_database(self) -> Iterator[tuple[Auth, DB]]:
        """Open the existing database; yield the rules on it, and the storage itself."""
        self.require_database()
        with closing(DB(self.settings.database, private=self.settings.production)) as db:
            yield Auth(db, self.settings), db

    @contextmanager
    def open_user(self) -> Iterator[tuple[Auth, DB, User]]:
        """Open the database and find the user named by the argument ``email``."""
        with self.open_database() as (auth, db):
            yield auth, db, auth.find_user(self.arguments.email)

    def print_record(self, text: str, **record: Any) -> None:
        """Print the text, or the record as JSON with ``--json``."""
        # JSON has no place for the bytes in a file's name that are no text: each becomes a question mark.
        line = json.loads(json.dumps(record, ensure_ascii=False).encode(errors="replace"))
        print(json.dumps(line) if self.arguments.json else printable(text))

    def log(self, event: str, **details: Any) -> None:
        """Log a change and the name of the person who made it."""
        name = login_name()
        log_event(event, operator=name, **details)
        syslog.openlog("authsvc", 0, syslog.LOG_AUTH)  # standard error of a terminal is not kept anywhere
        syslog.syslog(json.dumps({"event": event, "operator": name, **details}))


def login_name() -> str:
    """Return the name of the person who runs the command."""
    # Environment variables such as LOGNAME are not used: anybody can set them.
    with suppress(OSError):  # there is no terminal, as under a timer or in a container
        return os.getlogin()  # the person who logged in, even under sudo
    return user_name()


def user_name() -> str:
    """Return the name of the user of the operating system as which this process runs."""
    with suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_name
    return str(os.getuid())


def printable(text: str) -> str:
    """Return the text with a question mark for each character that could control a terminal.

    User agents, emails and file contents come from strangers.
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
