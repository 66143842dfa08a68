"""`verify` finds what was changed, removed or put in, whoever could write to the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")

from sqlalchemy import select, text

from anomalyst.station.audit import row_hash
from anomalyst.station.database import Database
from anomalyst.station.keys import add_key
from anomalyst.station.tables import AuditRow, Golden, Inspection
from anomalyst.station.verification import verify
from station_parts import API, bad, client_of, good, plain, send, settings

Tamper = Callable[..., None]


@pytest.fixture
def database(database_url: str, tmp_path: Path) -> Iterator[Database]:
    """A database after a small shift: three parts, of which one was decided twice."""
    with client_of(settings(tmp_path, database_url)) as client:
        for content in (plain(), good(1), bad()):
            assert send(client, content).status_code == 201
        uid = client.get(f"{API}/inspections").json()["items"][0]["id"]
        for word in ("good", "defect"):
            told = {"decision": word, "reason": "looked"}
            assert client.post(f"{API}/inspections/{uid}/decision", json=told).status_code == 200
    made = Database(database_url, tmp_path / "station" / "audit.head")
    yield made
    made.close()


@pytest.fixture
def tamper(database: Database) -> Tamper:
    """Writes past the triggers, as somebody with the file or the password can."""

    def run(words: str, **values: object) -> None:
        with database.engine.begin() as connection:
            if database.sqlite:
                for name in ("audit_no_update", "audit_no_delete"):
                    connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}")
            else:
                connection.exec_driver_sql("ALTER TABLE audit DISABLE TRIGGER ALL")
            assert connection.execute(text(words), values).rowcount > 0

    return run


def faults(database: Database) -> str:
    found = verify(database)
    assert found.ok == (not found.faults)
    return "; ".join(found.faults)


def test_an_untouched_station_is_whole(database: Database) -> None:
    found = verify(database)
    # recipe.add, recipe.version, recipe.activate, three inspections, two decisions
    assert (found.faults, found.rows, found.inspections) == ([], 8, 3)


def test_a_changed_row_is_found(database: Database, tamper: Tamper) -> None:
    tamper("UPDATE audit SET actor = 'eve' WHERE seq = 4")
    assert "row 4: was changed" in faults(database)


def test_a_row_changed_with_a_fitting_hash_is_found_by_the_next(
    database: Database, tamper: Tamper
) -> None:
    with database.read() as session:
        row = session.get_one(AuditRow, 4)
        row.actor = "eve"
        session.expunge(row)
    tamper("UPDATE audit SET actor = 'eve', hash = :hash WHERE seq = 4", hash=row_hash(row))
    assert "row 5: does not follow" in faults(database)


def test_a_removed_row_is_found(database: Database, tamper: Tamper) -> None:
    tamper("DELETE FROM audit WHERE seq = 5")
    assert "row 5: missing" in faults(database)


def test_rows_removed_from_the_end_are_found(database: Database, tamper: Tamper) -> None:
    tamper("DELETE FROM audit WHERE seq >= 7")
    tamper(
        "UPDATE inspections SET decision = NULL, decision_reason = NULL, decided_by = NULL, "
        "decided_at = NULL"
    )
    assert "row 8 was the last once" in faults(database)


def test_a_row_put_in_at_the_end_is_found(database: Database, tamper: Tamper) -> None:
    tamper(
        "INSERT INTO audit SELECT 9, at, actor, action, 'inspection:0', detail, hash, hash "
        "FROM audit WHERE seq = 8"
    )
    assert "row 9: was changed" in faults(database)


def test_a_rewritten_tail_is_found_by_the_witness(database: Database, tamper: Tamper) -> None:
    """The last row with another actor and a fitting hash: only the file outside knows better."""
    with database.read() as session:
        row = session.get_one(AuditRow, 8)
        row.actor = "eve"
        session.expunge(row)
    tamper("UPDATE audit SET actor = 'eve', hash = :hash WHERE seq = 8", hash=row_hash(row))
    assert faults(database) == "row 8: is not the one that was noted outside the database"


def test_a_changed_inspection_is_found_and_named(database: Database, tamper: Tamper) -> None:
    tamper("UPDATE inspections SET verdict = 'ok', score = 0 WHERE verdict = 'ng'")
    assert "score, verdict was changed" in faults(database)


def test_a_changed_decision_is_found(database: Database, tamper: Tamper) -> None:
    tamper("UPDATE inspections SET decision = 'good' WHERE decision = 'defect'")
    assert "its decision is not the one in the log" in faults(database)


def test_a_decision_that_nobody_made_is_found(database: Database, tamper: Tamper) -> None:
    tamper("UPDATE inspections SET decision = 'good' WHERE decision IS NULL")
    assert faults(database).count("its decision is not the one in the log") == 2


def test_a_removed_inspection_is_found(database: Database, tamper: Tamper) -> None:
    tamper("DELETE FROM inspections WHERE verdict = 'ng'")
    assert "was removed" in faults(database)


def test_an_inspection_put_in_is_found(database: Database, tamper: Tamper) -> None:
    columns = (
        "recipe_id, version_id, bundle_sha256, image_sha256, image_name, calibrated, by_hand, "
        "regions, source, seconds, actor, created_at"
    )
    tamper(
        f"INSERT INTO inspections (id, uid, {columns}) SELECT 99, 'fresh', {columns} "
        "FROM inspections WHERE id = 1"
    )
    assert "inspection fresh: 0 rows of the log tell of it" in faults(database)


@pytest.mark.parametrize(
    "words,said",
    [
        ('UPDATE recipe_versions SET thresholds = \'{"red": {"ng": 9}}\'', "version 1 is not as"),
        ("UPDATE recipe_versions SET method = 'another'", "version 1 is not as it was made"),
        ("UPDATE recipes SET active_version_id = NULL", ""),
        ("UPDATE api_keys SET role = 'engineer'", "key:anna: is not as it was made"),
        ("UPDATE golden SET expected = 'fail'", "golden:1: is not as it was made"),
        ("DELETE FROM golden", "golden:1: is gone"),
    ],
)
def test_settings_that_the_log_does_not_tell_of(
    database: Database, tamper: Tamper, tmp_path: Path, words: str, said: str
) -> None:
    add_key(database, "anna", "viewer", "test")
    with database.change("test") as change:
        part = change.session.scalars(select(Inspection)).first()
        assert part is not None
        sample = Golden(
            recipe_id=part.recipe_id,
            category="red",
            image_sha256=part.image_sha256,
            expected="pass",
            note="",
            created_by="test",
        )
        change.session.add(sample)
        change.session.flush()
        facts = {"category": "red", "image_sha256": part.image_sha256, "expected": "pass"}
        change.record("golden.add", f"golden:{sample.id}", recipe="plates", note="", **facts)
    assert faults(database) == ""
    tamper(words)
    assert said in faults(database)


def test_a_missing_witness_is_a_fault(database: Database, tmp_path: Path) -> None:
    (tmp_path / "station" / "audit.head").unlink()
    assert "audit.head is missing: without it nobody can tell" in faults(database)
