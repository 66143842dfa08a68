"""The station's database: SQLite in one file, or PostgreSQL; brought up to date when it is opened.

Whatever is acknowledged must survive a power cut, so SQLite syncs every commit to the disk. A
database that is gone raises `DatabaseGone` on each use, and works again once it is back.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event, exc, text
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.orm import Session

import anomalyst.migrations
from anomalyst.errors import InputError
from anomalyst.station.audit import Entry, Witness, append
from anomalyst.station.tables import Base

_WAIT_SECONDS = 10
_OURS = (exc.IntegrityError, exc.DataError, exc.ProgrammingError)  # no fault of the database


class DatabaseGone(Exception):
    """The database cannot be reached now; nothing of the transaction was kept."""


class DiskFull(Exception):
    """No room on the disk; nothing of the change was kept."""


class Change:
    """A transaction that writes: its session, and what the audit log will say of it."""

    def __init__(self, session: Session, actor: str) -> None:
        self.session = session
        self.actor = actor
        self.entries: list[Entry] = []

    def record(self, action: str, subject: str, **detail: Any) -> None:
        """Say what this transaction changes; a row of the audit log is written with it."""
        self.entries.append(Entry(self.actor, action, subject, detail))


class Database:
    """Sessions on one database.

    Parameters
    ----------
    url
        Of SQLAlchemy: ``sqlite:///PATH`` or ``postgresql+psycopg://USER:PASSWORD@HOST/NAME``.
    witness
        File that holds the audit log's newest hash; none by default.

    Raises
    ------
    InputError
        No such kind of database, it cannot be opened, or a newer anomalyst wrote it.
    """

    def __init__(self, url: str, witness: Path | None = None) -> None:
        self.url = _checked(url)
        self.witness = None if witness is None else Witness(witness)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = (
            _sqlite_engine(Path(self.url.database or "")) if self.sqlite else _postgres(self.url)
        )
        self._writes = self.engine.execution_options(writes=True)
        try:
            with _translated():
                self._upgrade()
        except (DatabaseGone, DiskFull) as error:
            self.close()
            raise InputError(f"{self.shown}: cannot open the database ({error})") from error

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a session that reads one state of the database; what it changes is not kept."""
        with _translated(), Session(self.engine, expire_on_commit=False) as session:
            if not self.sqlite:
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            yield session

    @contextmanager
    def change(self, actor: str) -> Iterator[Change]:
        """Open a transaction that writes, all of it or nothing, with its rows of the audit log.

        Raises
        ------
        DatabaseGone, DiskFull
            Nothing was written.
        """
        row = None
        with _translated(), Session(self._writes, expire_on_commit=False) as session:
            change = Change(session, actor)
            yield change
            session.flush()
            if not change.entries and _wrote(session):
                raise AssertionError("a change without a row of the audit log")
            for entry in change.entries:
                row = append(session, entry)
            session.commit()
        if row is not None and self.witness is not None:
            with suppress(OSError):  # a full disk: the next row is noted again
                self.witness.note(row.seq, row.hash)

    def check(self) -> None:
        """Raise `DatabaseGone` unless the database answers."""
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _upgrade(self) -> None:
        """Bring the tables up to date with Alembic, in one transaction."""
        config = Config()
        folder = str(Path(anomalyst.migrations.__file__).parent)
        config.set_main_option("script_location", folder)
        script = ScriptDirectory(folder, version_locations=[folder])
        with self._writes.connect() as connection, connection.begin():
            if not self.sqlite:  # two stations that start at once
                connection.execute(text("SELECT pg_advisory_xact_lock(7201)"))
            _run_migrations(config, script, connection, self.shown)


def _run_migrations(
    config: Config, script: ScriptDirectory, connection: Connection, shown: str
) -> None:
    def upgrade(revision: Any, _: Any) -> Any:
        known = {each.revision for each in script.walk_revisions()}
        present = {revision} if isinstance(revision, str) else set(revision)
        if not present <= known:
            raise InputError(
                f"{shown}: written by a newer anomalyst; upgrade with: pip install -U anomalyst"
            )
        return script._upgrade_revs("head", revision)

    with EnvironmentContext(config, script, fn=upgrade) as environment:
        environment.configure(connection=connection, target_metadata=Base.metadata)
        environment.run_migrations()


def _wrote(session: Session) -> bool:
    """Tell whether a session has sent rows that no audit row tells of."""
    return bool(session.info.get("wrote"))


@event.listens_for(Session, "after_flush")
def _note_writes(session: Session, context: Any) -> None:
    if session.new or session.dirty or session.deleted:
        session.info["wrote"] = True


def _checked(url: str) -> URL:
    try:
        made = make_url(url)
    except exc.ArgumentError:
        raise InputError(
            f"--db {url!r}: no database URL; give sqlite:///PATH or "
            "postgresql+psycopg://USER:PASSWORD@HOST/NAME"
        ) from None
    if made.drivername == "postgresql":
        made = made.set(drivername="postgresql+psycopg")
    if made.drivername not in ("sqlite", "postgresql+psycopg"):
        raise InputError(
            f"--db {made.drivername}: not a database that the station knows; give "
            "sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST/NAME"
        )
    if made.drivername == "sqlite" and made.database in (None, "", ":memory:"):
        raise InputError("--db sqlite: give a file, such as sqlite:///station.db")
    return made


def _postgres(url: URL) -> Engine:
    if find_spec("psycopg") is None:
        raise InputError("--db postgresql needs psycopg: pip install 'psycopg[binary]'")
    options = {"connect_timeout": 5, "options": f"-c lock_timeout={_WAIT_SECONDS}s"}
    return create_engine(
        url, pool_pre_ping=True, pool_timeout=_WAIT_SECONDS, pool_size=8, connect_args=options
    )


def _sqlite_engine(path: Path) -> Engine:
    """Return an engine that never makes a new file in place of one that vanished."""
    path = path.resolve()
    try:
        path.touch(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot open the database ({error.strerror})") from None

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(
            f"{path.as_uri()}?mode=rw",
            uri=True,
            timeout=_WAIT_SECONDS,
            isolation_level=None,  # `begin` below says how a transaction starts
            check_same_thread=False,
        )

    engine = create_engine(
        f"sqlite:///{path}", creator=connect, pool_size=8, pool_timeout=_WAIT_SECONDS
    )
    event.listen(engine, "connect", _prepare(path))
    event.listen(engine, "checkout", _same_file(path))
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(path: Path) -> Any:
    def on_connect(connection: sqlite3.Connection, record: Any) -> None:
        record.info["file"] = _identity(path)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    return on_connect


def _same_file(path: Path) -> Any:
    """Refuse a connection to a file that was moved away: what it wrote there would be lost."""

    def on_checkout(connection: Any, record: Any, proxy: Any) -> None:
        if record.info.get("file") != _identity(path):
            raise exc.DisconnectionError(f"{path} is not the file that was opened")

    return on_checkout


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what a database says when it is gone, locked or full into the station's two errors."""
    try:
        yield
    except (exc.DatabaseError, exc.InterfaceError, exc.TimeoutError) as error:
        if isinstance(error, _OURS):
            raise
        cause = getattr(error, "orig", None) or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        if "disk is full" in reason or type(cause).__name__ == "DiskFull":
            raise DiskFull(f"the database has no room ({reason})") from error
        raise DatabaseGone(f"the database cannot be used ({reason})") from error
