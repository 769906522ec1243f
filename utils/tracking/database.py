"""SQLite files of ours: opened the same way everywhere, shared by processes, and every fault a
typed line.

Purpose: `open_database` opens or makes a file of a `Schema`; `transaction` writes to it, all or
  nothing.
Used by: utils.jobs.queue, utils.tracking.experiment_log, utils.tracking.experiments
Design notes: write-ahead log, so that readers never wait for a writer and a writer only for another
  writer, whom it gives `wait_s` seconds. `application_id` says whose file it is and `user_version`
  which schema; both and every column are compared on opening. Commits are not fsynced one by one
  (synchronous NORMAL): a power cut may lose the last ones, a killed process loses none. The log
  needs shared memory beside the file: on a network mount one machine at a time.
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


@dataclass(frozen=True, slots=True)
class Schema:
    """what: the file in plain words, for messages; application_id: 31 bits of our own; statements.

    Create all of it.
    """

    what: str
    application_id: int
    version: int
    statements: tuple[str, ...]

    def columns(self) -> dict[str, list[str]]:
        """table -> its columns, as the statements make them."""
        return _columns_of(self.statements)


def open_database(
    path: Path, schema: Schema, *, wait_s: float = 20.0, create: bool = True
) -> sqlite3.Connection:
    """A connection in autocommit mode, usable from any one thread at a time; the folder and the
    file are made when they are not there.

    Raises DatabaseError: locked for longer than wait_s, a newer schema, not a database, another
    program's, or not writable. ConfigError when there is none and create is false.
    """
    if not create and not path.is_file():
        raise ConfigError(
            f"no {schema.what} there",
            where=path,
            remedy="train something first, or name another file",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(
            f"the {schema.what}'s folder cannot be made",
            where=path.parent,
            found=error.strerror,
            remedy="name another file",
        ) from None
    connection = None
    try:
        with _typed(path, schema, wait_s):
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
    """Everything in the block is written, or nothing.

    With write false, everything is read from one moment. Raises DatabaseError.
    """
    with _typed(path, schema, None):
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
    _until(time.monotonic() + wait_s, connection, "PRAGMA journal_mode = WAL")
    if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
        with transaction(connection, path, schema):
            # Another process may have made the tables since we looked.
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in schema.statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {schema.application_id:d}")
                connection.execute(f"PRAGMA user_version = {schema.version:d}")
    _check_owner(connection, path, schema)
    for table, columns in schema.columns().items():
        found = [
            row[0] for row in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))
        ]
        if found != columns:
            raise DatabaseError(
                f"the {schema.what} was changed",
                where=f"{path}, table {table}",
                expected=", ".join(columns),
                found=", ".join(found) or "no such table",
                remedy="move it away, or name another file",
            )


def _check_owner(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    # Read from one moment: another process may be making the tables between two of them.
    connection.execute("BEGIN")
    try:
        objects, owner, version = (
            connection.execute(query).fetchone()[0]
            for query in (
                "SELECT count(*) FROM sqlite_master",
                "PRAGMA application_id",
                "PRAGMA user_version",
            )
        )
    finally:
        connection.execute("ROLLBACK")
    if owner != schema.application_id and (owner or version or objects):
        raise DatabaseError(
            f"the file is a database, but no {schema.what}", where=path, remedy="name another file"
        )
    if version > schema.version:
        raise DatabaseError(
            f"the {schema.what} is of a newer schema",
            where=path,
            expected=f"at most {schema.version}",
            found=version,
            remedy="update this program: pip install --upgrade tensor-warehouse",
        )


def _until(deadline: float, connection: sqlite3.Connection, statement: str) -> None:
    """Switching to the write-ahead log answers "locked" at once while others do the same.

    SQLite's own patience does not cover it.
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
def _typed(path: Path, schema: Schema, wait_s: float | None) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        # An extended code's low byte is its kind; errors of the module itself have none.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in LOCKED:
            found = (
                "another process is writing"
                if wait_s is None
                else f"another process holds it for more than {wait_s:g} s"
            )
            raise DatabaseError(
                f"the {schema.what} is locked",
                where=path,
                found=found,
                remedy="wait for it, or find it with: fuser " + str(path),
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
        tables = [
            row[0] for row in memory.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        return {
            table: [
                row[0] for row in memory.execute("SELECT name FROM pragma_table_info(?)", (table,))
            ]
            for table in tables
        }
    finally:
        memory.close()
