"""API keys: ``ast_<id>_<secret>``, with a role each.

Of the secret, 256 random bits, the database keeps the plain SHA-256: slow hashes protect secrets
that people choose and that can be guessed, and 2^256 cannot be tried however fast the hash is.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Literal, get_args

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from anomalyst.errors import InputError, unknown
from anomalyst.station.database import Database
from anomalyst.station.tables import ApiKey, now

Role = Literal["viewer", "operator", "engineer"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Each may do what those before it may."""


def add_key(database: Database, name: str, role: str, actor: str) -> str:
    """Make a key and return it; this is the only time that it can be seen."""
    if role not in ROLES:
        raise unknown("role", role, ROLES)
    if not name.strip() or len(name) > 100 or not name.isprintable():
        raise InputError("a key's name is 1 to 100 printable characters: whose is it?")
    secret = secrets.token_hex(32)
    try:
        with database.change(actor) as change:
            key = change.session.scalars(select(ApiKey).where(ApiKey.name == name)).first()
            if key is None or key.revoked_at is None:  # the name of a working key is refused below
                key = ApiKey(name=name)
                change.session.add(key)
            key.role, key.sha256, key.revoked_at = role, _digest(secret), None
            change.session.flush()
            change.record("key.add", f"key:{name}", id=key.id, role=role, sha256=key.sha256)
    except IntegrityError:
        raise InputError(f"there is a key {name!r} already: choose another name") from None
    return f"ast_{key.id}_{secret}"


def revoke_key(database: Database, name: str, actor: str) -> None:
    """End a key; its name may get a new one."""
    with database.change(actor) as change:
        key = change.session.scalars(select(ApiKey).where(ApiKey.name == name)).first()
        if key is None:
            known = change.session.scalars(select(ApiKey.name)).all()
            raise unknown("key", name, known)
        if key.revoked_at is not None:
            raise InputError(f"key {name!r} was revoked already, on {key.revoked_at}")
        key.revoked_at = now()
        change.record("key.revoke", f"key:{name}", id=key.id)


def list_keys(session: Session) -> list[dict[str, str | None]]:
    """Return name, role and times of every key."""
    keys = session.scalars(select(ApiKey).order_by(ApiKey.id)).all()
    return [
        {"name": k.name, "role": k.role, "created_at": k.created_at, "revoked_at": k.revoked_at}
        for k in keys
    ]


def find_key(session: Session, token: str) -> ApiKey | None:
    """Return the key that a token is, None where it is none or was revoked."""
    words = token.split("_")
    if len(words) != 3 or words[0] != "ast" or not (words[1].isascii() and words[1].isdigit()):
        return None
    if len(words[1]) > 15:
        return None
    key = session.get(ApiKey, int(words[1]))
    right = key is not None and hmac.compare_digest(key.sha256, _digest(words[2]))
    return key if key is not None and right and key.revoked_at is None else None


def any_key(session: Session, active: bool = False) -> bool:
    """Tell whether a key was ever made, or one works now."""
    query = select(ApiKey.id).limit(1)
    if active:
        query = query.where(ApiKey.revoked_at.is_(None))
    return session.scalars(query).first() is not None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
