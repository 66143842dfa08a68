"""The audit log: who changed what, each row chained to the one before by its hash.

A row is written in the same transaction as the change that it tells of, so there is neither without
the other. `Witness` keeps the newest row's hash in a file outside the database, so that rows taken
off the end are missed too.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from anomalyst.station.tables import AuditRow, now

FIRST = "0" * 64
"""What the first row has for ``previous``."""


@dataclass(frozen=True)
class Entry:
    """What happened: ``detail`` is JSON, ``subject`` such as ``inspection:UID``."""

    actor: str
    action: str
    subject: str
    detail: Mapping[str, Any]


def canonical(value: object) -> str:
    """Return JSON that is the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def row_hash(row: AuditRow) -> str:
    """Return the SHA-256 of the previous hash and the canonical JSON of the row's other fields."""
    fields = {
        "seq": row.seq,
        "at": row.at,
        "actor": row.actor,
        "action": row.action,
        "subject": row.subject,
        "detail": row.detail,
    }
    return hashlib.sha256((row.previous + canonical(fields)).encode()).hexdigest()


def append(session: Session, entry: Entry) -> AuditRow:
    """Add a row to the log, as the last thing of a transaction that writes."""
    if session.get_bind().dialect.name == "postgresql":
        # Others wait here until this transaction ends; SQLite lets one write at a time anyway.
        session.execute(text("LOCK TABLE audit IN EXCLUSIVE MODE"))
    last = session.scalars(select(AuditRow).order_by(AuditRow.seq.desc()).limit(1)).first()
    row = AuditRow(
        seq=1 if last is None else last.seq + 1,
        at=now(),
        actor=entry.actor,
        action=entry.action,
        subject=entry.subject,
        detail=canonical(entry.detail),
        previous=FIRST if last is None else last.hash,
    )
    row.hash = row_hash(row)
    session.add(row)
    session.flush()
    return row


class Witness:
    """The newest row's number and hash, in a file of one line outside the database."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, seq: int, digest: str) -> None:
        """Remember a committed row; an older one than is known changes nothing."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with open(handle, "r+b", buffering=0) as file, _alone(file):
            known = _parsed(file.read(200))
            if known is None or known[0] < seq:
                file.seek(0)
                file.write(f"{seq:020d} {digest}\n".encode())

    def read(self) -> tuple[int, str] | None:
        """Return number and hash of the newest row that was noted, None before the first."""
        return _parsed(self.path.read_bytes()) if self.path.is_file() else None


@contextmanager
def _alone(file: IO[bytes]) -> Iterator[None]:
    """Hold an open file against other processes and threads."""
    if sys.platform == "win32":  # no such locks there; the command line seldom writes meanwhile
        yield
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _parsed(line: bytes) -> tuple[int, str] | None:
    words = line.decode("ascii", "replace").split()
    return (int(words[0]), words[1]) if len(words) == 2 and words[0].isdigit() else None
