"""The errors of both engines. Every layer above may catch them."""


class AlreadyExists(Exception):
    """A row with the same email or the same secret exists."""


class StorageUnavailable(Exception):
    """The database cannot be read or written now: it is locked, full, damaged, gone or does not answer."""


class DatabaseRefused(Exception):
    """The database cannot be opened by this release. Nothing in it was changed."""


class RolledBack(Exception):
    """Raised inside a transaction to undo it."""
