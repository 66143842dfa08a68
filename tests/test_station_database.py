"""The station's database and its audit log, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the extra [station] is not installed")

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, exc, select, text
from sqlalchemy.engine import make_url

from anomalyst.errors import InputError
from anomalyst.station.audit import FIRST, Witness, canonical
from anomalyst.station.database import Database, DatabaseGone, DiskFull
from anomalyst.station.tables import AuditRow, Base, Recipe, now


@pytest.fixture
def database(database_url: str, tmp_path: Path) -> Iterator[Database]:
    made = Database(database_url, tmp_path / "audit.head")
    yield made
    made.close()


def rows(database: Database) -> list[AuditRow]:
    with database.read() as session:
        return list(session.scalars(select(AuditRow).order_by(AuditRow.seq)))


def add(database: Database, name: str) -> None:
    with database.change("anna") as change:
        change.session.add(Recipe(name=name))
        change.record("recipe.add", f"recipe:{name}", note="ä")


def test_migrations_make_the_tables_of_the_models(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_opening_again_changes_nothing(database: Database) -> None:
    add(database, "a")
    again = Database(database.url.render_as_string(hide_password=False))
    assert [row.subject for row in rows(again)] == ["recipe:a"]
    again.close()


def test_a_database_of_a_newer_anomalyst_is_refused(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InputError, match="newer anomalyst"):
        Database(database.url.render_as_string(hide_password=False))


def test_a_row_of_the_log_is_chained_to_the_one_before(database: Database) -> None:
    add(database, "a")
    add(database, "b")
    first, second = rows(database)
    assert (first.seq, first.previous, first.actor) == (1, FIRST, "anna")
    assert (second.seq, second.previous) == (2, first.hash)
    # Computed by hand: the previous hash, then the other fields as sorted JSON without spaces.
    said = {k: getattr(second, k) for k in ("seq", "at", "actor", "action", "subject", "detail")}
    text_ = second.previous + json.dumps(said, sort_keys=True, separators=(",", ":"))
    assert second.hash == sha256(text_.encode()).hexdigest()
    assert json.loads(second.detail) == {"note": "ä"}


def test_a_change_that_fails_leaves_neither_rows_nor_log(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.change("anna") as change:
        change.session.add(Recipe(name="a"))
        change.record("recipe.add", "recipe:a")
        change.session.flush()
        raise ZeroDivisionError
    with database.read() as session:
        assert session.scalars(select(Recipe)).all() == []
    assert rows(database) == []


def test_a_change_that_the_log_does_not_tell_of_is_refused(database: Database) -> None:
    with pytest.raises(AssertionError, match="audit"), database.change("anna") as change:
        change.session.add(Recipe(name="a"))
    with database.read() as session:
        assert session.scalars(select(Recipe)).all() == []


@pytest.mark.parametrize("words", ["UPDATE audit SET actor = 'eve'", "DELETE FROM audit"])
def test_the_database_refuses_to_change_the_log(database: Database, words: str) -> None:
    add(database, "a")
    with pytest.raises(exc.DBAPIError, match="only grows"), database.engine.begin() as connection:
        connection.execute(text(words))
    assert [row.actor for row in rows(database)] == ["anna"]


def test_many_writers_make_one_chain(database: Database) -> None:
    def work(who: int) -> None:
        for k in range(5):
            add(database, f"{who}-{k}")

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = rows(database)
    assert [row.seq for row in found] == list(range(1, 21))
    assert [row.previous for row in found[1:]] == [row.hash for row in found[:-1]]
    assert database.witness is not None
    assert database.witness.read() == (20, found[-1].hash)


def test_a_database_that_is_gone_works_again_once_it_is_back(database: Database) -> None:
    add(database, "a")
    with gone(database):
        with pytest.raises(DatabaseGone):
            add(database, "b")
        with pytest.raises(DatabaseGone):
            database.check()
    add(database, "c")
    database.check()
    assert [row.subject for row in rows(database)] == ["recipe:a", "recipe:c"]


@contextmanager
def gone(database: Database) -> Iterator[None]:
    """Take the database away: move SQLite's file, or let PostgreSQL throw everybody out."""
    if database.sqlite:
        file = Path(database.url.database or "")
        file.rename(file.with_name("away"))
        yield
        assert not file.exists(), "a new, empty database took the place of the one that was gone"
        file.with_name("away").rename(file)
        return
    name = database.url.database
    server = create_engine(
        make_url(database.url).set(database="postgres"), isolation_level="AUTOCOMMIT"
    )
    with server.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        connection.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
            {"name": name},
        )
        yield
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    server.dispose()


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    add(database, "a")
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    copy = (tmp_path / "a.db").read_bytes()
    add(database, "b")
    for file in tmp_path.glob("a.db*"):
        file.rename(tmp_path / f"old-{file.name}")
    (tmp_path / "a.db").write_bytes(copy)
    assert [row.subject for row in rows(database)] == ["recipe:a"]


def test_a_full_disk_is_told_and_keeps_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with database.engine.connect() as connection:
        used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    def limit(connection: object, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count={used + 2}")  # type: ignore[attr-defined]

    from sqlalchemy import event

    event.listen(database.engine, "checkout", limit)
    with pytest.raises(DiskFull), database.change("anna") as change:
        change.session.add(Recipe(name="a"))
        change.record("recipe.add", "recipe:a", note="x" * 100_000)
    with database.read() as session:
        assert session.scalars(select(Recipe)).all() == []


def test_sqlite_syncs_every_commit(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1


@pytest.mark.parametrize("url", ["nonsense", "mysql://a/b", "sqlite://", "sqlite:///no/such/x.db"])
def test_urls_that_cannot_be_are_refused_in_one_line(url: str) -> None:
    with pytest.raises(InputError) as error:
        Database(url)
    assert "\n" not in str(error.value)


def test_a_password_is_never_shown() -> None:
    with pytest.raises(InputError) as error:
        Database("postgresql+psycopg://me:hidden@127.0.0.1:1/none")
    assert "hidden" not in str(error.value)
    assert "127.0.0.1" in str(error.value)


def test_the_witness_never_goes_back(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "head")
    assert witness.read() is None
    witness.note(7, "b" * 64)
    witness.note(3, "a" * 64)
    assert witness.read() == (7, "b" * 64)


def test_times_have_one_width_and_canonical_json_one_form() -> None:
    assert len(now()) == 27
    assert now().endswith("Z")
    assert canonical({"b": 1, "a": [0.1, None]}) == '{"a":[0.1,null],"b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        canonical({"a": float("nan")})
