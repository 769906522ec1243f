"""Opening SQLite files in one way: shared by processes, and every fault as a typed error.

Purpose: `open_database` opens or makes a file of a `Schema`; `transaction` writes to it, all or
  nothing.
Used by: utils.jobs.queue, utils.tracking.experiment_log, utils.tracking.experiments
Design notes: the write-ahead log lets readers work while somebody writes; a writer waits `wait_s`
  seconds for another writer. `application_id` says whose file it is and `user_version` which
  schema; both and every column are compared on opening. Commits are not fsynced one by one
  (synchronous NORMAL): a power cut may lose the last ones, a killed process loses none. The
  write-ahead log needs shared memory beside the file, so on a network mount only one machine may
  write.
Assistant guidance: when extending: values travel as parameters, never in the statement; a changed
  table is a new schema version.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from warehouse.errors import ConfigError, DatabaseError

__all__ = ["Schema", "open_database", "transaction"]

RETRY_S = 0.02
LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
REASONS = {
    sqlite3.SQLITE_NOTADB: ("is not a database", "move it away, or name another file"),
    sqlite3.SQLITE_CORRUPT: (
        "is damaged",
        "save what can be read with the sqlite3 shell's .recover, then move it away",
    ),
    sqlite3.SQLITE_FULL: ("cannot be written", "free some space"),
}
"""SQLite's error code -> what is wrong with the file, and the remedy."""
COLUMNS = "SELECT name FROM pragma_table_info(?)"


@dataclass(frozen=True, slots=True)
class Schema:
    """What a file consists of.

    Attributes
    ----------
    what
        The file in plain words, for messages.
    application_id
        31 bits that no other program uses.
    statements
        They create all of it.
    """

    what: str
    application_id: int
    version: int
    statements: tuple[str, ...]

    def columns(self) -> dict[str, list[str]]:
        """Return the columns of each table, as the statements make them."""
        return _columns_of(self.statements)


def open_database(
    path: Path, schema: Schema, *, wait_s: float = 20.0, create: bool = True
) -> sqlite3.Connection:
    """Open a file, or make it with its folder.

    Parameters
    ----------
    wait_s
        Seconds to wait for another process that is writing.
    create
        Whether a file that is not there is made.

    Returns
    -------
    sqlite3.Connection
        In autocommit mode; usable from any one thread at a time.

    Raises
    ------
    DatabaseError
        The file is locked for longer than `wait_s`, has a newer schema, is not a database, belongs
        to another program, or cannot be written.
    ConfigError
        There is no file, and `create` is false.
    """
    if not create and not path.is_file():
        raise ConfigError(
            f"there is no {schema.what}",
            where=path,
            remedy="train something first, or name another file",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(
            f"the folder of the {schema.what} cannot be made",
            where=path.parent,
            found=error.strerror,
            remedy="name another file",
        ) from None

    connection = None
    try:
        with _typed_errors(path, schema, wait_s):
            connection = sqlite3.connect(
                path, timeout=wait_s, isolation_level=None, check_same_thread=False
            )
            _prepare(connection, path, schema, wait_s)
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    return connection


@contextlib.contextmanager
def transaction(
    connection: sqlite3.Connection, path: Path, schema: Schema, *, write: bool = True
) -> Iterator[sqlite3.Connection]:
    """Write everything in the block, or nothing.

    Parameters
    ----------
    write
        False: only read, everything from one moment.

    Raises
    ------
    DatabaseError
        The file cannot be read or written.
    """
    with _typed_errors(path, schema, None):
        # IMMEDIATE takes the write lock now: a later upgrade could fail in the middle.
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _prepare(connection: sqlite3.Connection, path: Path, schema: Schema, wait_s: float) -> None:
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")
    _check_owner(connection, path, schema)
    _retry(time.monotonic() + wait_s, connection, "PRAGMA journal_mode = WAL")
    if _schema_version(connection) == 0:
        with transaction(connection, path, schema):
            # Another process may have made the tables in the meantime.
            if _schema_version(connection) == 0:
                for statement in schema.statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {schema.application_id:d}")
                connection.execute(f"PRAGMA user_version = {schema.version:d}")
    _check_owner(connection, path, schema)
    _check_columns(connection, path, schema)


def _schema_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _check_columns(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    for table, columns in schema.columns().items():
        found = [row[0] for row in connection.execute(COLUMNS, (table,))]
        if found != columns:
            raise DatabaseError(
                f"the {schema.what} was changed by another program",
                where=f"{path}, table {table}",
                expected=", ".join(columns),
                found=", ".join(found) or "no such table",
                remedy="move it away, or name another file",
            )


def _check_owner(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    queries = (
        "SELECT count(*) FROM sqlite_master",
        "PRAGMA application_id",
        "PRAGMA user_version",
    )
    # Read from one moment: another process may be making the tables between two of them.
    connection.execute("BEGIN")
    try:
        objects, owner, version = (connection.execute(query).fetchone()[0] for query in queries)
    finally:
        connection.execute("ROLLBACK")
    if owner != schema.application_id and (owner or version or objects):
        raise DatabaseError(
            f"the file is a database of another program, not the {schema.what}",
            where=path,
            remedy="name another file",
        )
    if version > schema.version:
        raise DatabaseError(
            f"the {schema.what} has a newer schema than this program knows",
            where=path,
            expected=f"at most {schema.version}",
            found=version,
            remedy="update this program: pip install --upgrade tensor-warehouse",
        )


def _retry(deadline: float, connection: sqlite3.Connection, statement: str) -> None:
    """Execute a statement, again while the file is locked.

    Switching to the write-ahead log answers "locked" at once while others do the same; SQLite's
    own timeout does not cover it.
    """
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in LOCKED or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


@contextlib.contextmanager
def _typed_errors(path: Path, schema: Schema, wait_s: float | None) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        # An extended code's low byte is its kind; errors of the module itself have none.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in LOCKED:
            found = "another process is writing"
            if wait_s is not None:
                found = f"another process has held it for more than {wait_s:g} s"
            raise DatabaseError(
                f"the {schema.what} is locked",
                where=path,
                found=found,
                remedy=f"wait for the process, or find it with: fuser {path}",
            ) from None
        what, remedy = REASONS.get(
            code, ("cannot be used", "name a file in a folder that can be written")
        )
        raise DatabaseError(
            f"the {schema.what} {what}", where=path, found=str(error), remedy=remedy
        ) from None


@functools.cache
def _columns_of(statements: tuple[str, ...]) -> dict[str, list[str]]:
    memory = sqlite3.connect(":memory:")
    try:
        for statement in statements:
            memory.execute(statement)
        tables = memory.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {table: [row[0] for row in memory.execute(COLUMNS, (table,))] for (table,) in tables}
    finally:
        memory.close()
