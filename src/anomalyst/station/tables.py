"""What the station keeps in its database, as typed SQLAlchemy models.

Times are text in UTC (`now`), of fixed width, so that their order as text is their order in time
and the audit log's hashes are the same in every database. Pictures and maps lie in the `Store`.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite numbers rows by itself only where the type is INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")
_Json = JSON(none_as_null=True)


def now() -> str:
    """Return the time in UTC, such as ``2026-01-31T08:15:00.000000Z``."""
    return time_text(datetime.now(timezone.utc))


def time_text(moment: datetime) -> str:
    """Return a moment as the tables hold it; one without a time zone is meant in UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    utc = moment.astimezone(timezone.utc)
    return utc.isoformat(timespec="microseconds").replace("+00:00", "Z")


class Base(DeclarativeBase):
    """All tables of the station."""

    type_annotation_map = {  # noqa: RUF012
        int: _Id,
        str: Text(),
        float: Double(),
        bool: Boolean(),
        bytes: LargeBinary(),
        dict[str, Any]: _Json,
        list[Any]: _Json,
    }


class Recipe(Base):
    """What a line switches by name; ``active_version_id`` is the version that judges."""

    __tablename__ = "recipes"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    # No foreign key: versions refer to recipes, and SQLite cannot add one later.
    active_version_id: Mapped[int | None]
    created_at: Mapped[str] = mapped_column(default=now)


class RecipeVersion(Base):
    """One state of a recipe, never changed: a bundle, and thresholds where an engineer set them.

    ``thresholds`` is ``{category: {"ng": score | null, "review": score | null}}``.
    """

    __tablename__ = "recipe_versions"
    __table_args__ = (UniqueConstraint("recipe_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipes.id"))
    number: Mapped[int] = mapped_column(Integer())
    bundle_sha256: Mapped[str]
    kind: Mapped[str]
    method: Mapped[str]
    thresholds: Mapped[dict[str, Any] | None]
    note: Mapped[str] = mapped_column(default="")
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("recipe_versions.id"))
    created_by: Mapped[str]
    created_at: Mapped[str] = mapped_column(default=now)


class Image(Base):
    """A picture in the store; width and height are those of the upright picture."""

    __tablename__ = "images"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    bytes: Mapped[int]
    width: Mapped[int] = mapped_column(Integer())
    height: Mapped[int] = mapped_column(Integer())
    media_type: Mapped[str]
    created_at: Mapped[str] = mapped_column(default=now)


class Inspection(Base):
    """What was said of one picture, by which model, and what the operator decided.

    A watched file that cannot be read has its ``error`` and nothing else; its picture is not kept.
    ``descriptor`` is the picture's unit vector in half precision, little endian.
    """

    __tablename__ = "inspections"
    __table_args__ = (
        Index("ix_inspections_recipe", "recipe_id", "id"),
        Index("ix_inspections_part", "part_id", "id"),
        Index("ix_inspections_image", "image_sha256"),
        Index("ix_inspections_created", "created_at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    uid: Mapped[str] = mapped_column(unique=True)
    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipes.id"))
    version_id: Mapped[int] = mapped_column(ForeignKey("recipe_versions.id"))
    bundle_sha256: Mapped[str]
    image_sha256: Mapped[str | None]
    image_name: Mapped[str]
    part_id: Mapped[str | None]
    category: Mapped[str | None]
    score: Mapped[float | None]
    p_value: Mapped[float | None]
    verdict: Mapped[str | None]
    threshold: Mapped[float | None]
    threshold_review: Mapped[float | None]
    calibrated: Mapped[bool] = mapped_column(default=False)
    by_hand: Mapped[bool] = mapped_column(default=False)
    regions: Mapped[list[Any]] = mapped_column(default=list)
    map_sha256: Mapped[str | None]
    similarity: Mapped[float | None]
    descriptor: Mapped[bytes | None] = mapped_column(deferred=True)
    drift: Mapped[float | None]
    source: Mapped[str]
    error: Mapped[str | None]
    seconds: Mapped[float]
    actor: Mapped[str]
    created_at: Mapped[str] = mapped_column(default=now)
    decision: Mapped[str | None]
    decision_reason: Mapped[str | None]
    decided_by: Mapped[str | None]
    decided_at: Mapped[str | None]


class AuditRow(Base):
    """One line of the audit log, see `audit`; the database refuses to change or delete it."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_subject", "subject", "seq"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[str]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[str]
    previous: Mapped[str]
    hash: Mapped[str]


class ApiKey(Base):
    """Who may do what; of the secret only its SHA-256."""

    __tablename__ = "api_keys"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str]
    sha256: Mapped[str]
    created_at: Mapped[str] = mapped_column(default=now)
    revoked_at: Mapped[str | None]


class Watch(Base):
    """A folder whose new pictures are inspected by a recipe."""

    __tablename__ = "watches"

    id: Mapped[int] = mapped_column(primary_key=True)
    folder: Mapped[str] = mapped_column(unique=True)
    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipes.id"))
    category: Mapped[str | None]
    created_by: Mapped[str]
    created_at: Mapped[str] = mapped_column(default=now)


class Watched(Base):
    """A file of a watched folder that was inspected: once for each content that it had."""

    __tablename__ = "watched"
    __table_args__ = (UniqueConstraint("folder", "name", "image_sha256"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    folder: Mapped[str]
    name: Mapped[str]
    image_sha256: Mapped[str]
    bytes: Mapped[int]
    modified_ns: Mapped[int]
    inspection_id: Mapped[int] = mapped_column(ForeignKey("inspections.id"))
    created_at: Mapped[str] = mapped_column(default=now)


class Golden(Base):
    """A sample that every change of its recipe must judge as expected: ``pass`` or ``fail``."""

    __tablename__ = "golden"
    __table_args__ = (UniqueConstraint("recipe_id", "category", "image_sha256"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipes.id"))
    category: Mapped[str]
    image_sha256: Mapped[str] = mapped_column(ForeignKey("images.sha256"))
    expected: Mapped[str]
    note: Mapped[str] = mapped_column(default="")
    created_by: Mapped[str]
    created_at: Mapped[str] = mapped_column(default=now)


class Teaching(Base):
    """A picture taught to a recipe: ``normal``, or ``abnormal`` and maybe with its mask."""

    __tablename__ = "teachings"
    __table_args__ = (Index("ix_teachings_recipe", "recipe_id", "category"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    recipe_id: Mapped[int] = mapped_column(ForeignKey("recipes.id"))
    image_sha256: Mapped[str] = mapped_column(ForeignKey("images.sha256"))
    category: Mapped[str]
    label: Mapped[str]
    mask_sha256: Mapped[str | None]
    created_by: Mapped[str]
    created_at: Mapped[str] = mapped_column(default=now)
    version_id: Mapped[int | None] = mapped_column(ForeignKey("recipe_versions.id"))
