"""The first tables of the station, and an audit log that only grows."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON(none_as_null=True)
_REFUSAL = "the audit log only grows"


def upgrade() -> None:
    _recipes()
    _pictures()
    _inspections()
    _watches()
    _quality()
    _keys()
    _audit()


def _texts(*names: str, null: bool = False) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.Text(), nullable=null) for name in names]


def _numbers(*names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.Double(), nullable=True) for name in names]


def _id() -> sa.Column[Any]:
    return sa.Column("id", _ID, primary_key=True)


def _link(name: str, target: str, null: bool = False) -> sa.Column[Any]:
    kind = sa.Text() if target.endswith("sha256") else _ID
    return sa.Column(name, kind, sa.ForeignKey(target), nullable=null)


def _recipes() -> None:
    op.create_table(
        "recipes",
        _id(),
        *_texts("name", "created_at"),
        sa.Column("active_version_id", _ID, nullable=True),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "recipe_versions",
        _id(),
        _link("recipe_id", "recipes.id"),
        sa.Column("number", sa.Integer(), nullable=False),
        *_texts("bundle_sha256", "kind", "method", "note", "created_by", "created_at"),
        sa.Column("thresholds", _JSON, nullable=True),
        _link("parent_id", "recipe_versions.id", null=True),
        sa.UniqueConstraint("recipe_id", "number"),
    )


def _pictures() -> None:
    op.create_table(
        "images",
        sa.Column("sha256", sa.Text(), primary_key=True),
        sa.Column("bytes", _ID, nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        *_texts("media_type", "created_at"),
    )


def _inspections() -> None:
    op.create_table(
        "inspections",
        _id(),
        *_texts("uid", "bundle_sha256", "image_name", "source", "actor", "created_at"),
        _link("recipe_id", "recipes.id"),
        _link("version_id", "recipe_versions.id"),
        *_texts("image_sha256", "part_id", "category", "verdict", "map_sha256", null=True),
        *_numbers("score", "p_value", "threshold", "threshold_review", "similarity", "drift"),
        sa.Column("calibrated", sa.Boolean(), nullable=False),
        sa.Column("by_hand", sa.Boolean(), nullable=False),
        sa.Column("regions", _JSON, nullable=False),
        sa.Column("descriptor", sa.LargeBinary(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=False),
        *_texts("error", "decision", "decision_reason", "decided_by", "decided_at", null=True),
        sa.UniqueConstraint("uid"),
    )
    op.create_index("ix_inspections_recipe", "inspections", ["recipe_id", "id"])
    op.create_index("ix_inspections_part", "inspections", ["part_id", "id"])
    op.create_index("ix_inspections_image", "inspections", ["image_sha256"])
    op.create_index("ix_inspections_created", "inspections", ["created_at"])


def _watches() -> None:
    op.create_table(
        "watches",
        _id(),
        *_texts("folder", "created_by", "created_at"),
        *_texts("category", null=True),
        _link("recipe_id", "recipes.id"),
        sa.UniqueConstraint("folder"),
    )
    op.create_table(
        "watched",
        _id(),
        *_texts("folder", "name", "image_sha256", "created_at"),
        sa.Column("bytes", _ID, nullable=False),
        sa.Column("modified_ns", _ID, nullable=False),
        _link("inspection_id", "inspections.id"),
        sa.UniqueConstraint("folder", "name", "image_sha256"),
    )


def _quality() -> None:
    op.create_table(
        "golden",
        _id(),
        _link("recipe_id", "recipes.id"),
        _link("image_sha256", "images.sha256"),
        *_texts("category", "expected", "note", "created_by", "created_at"),
        sa.UniqueConstraint("recipe_id", "category", "image_sha256"),
    )
    op.create_table(
        "teachings",
        _id(),
        _link("recipe_id", "recipes.id"),
        _link("image_sha256", "images.sha256"),
        *_texts("category", "label", "created_by", "created_at"),
        *_texts("mask_sha256", null=True),
        _link("version_id", "recipe_versions.id", null=True),
    )
    op.create_index("ix_teachings_recipe", "teachings", ["recipe_id", "category"])


def _keys() -> None:
    op.create_table(
        "api_keys",
        _id(),
        *_texts("name", "role", "sha256", "created_at"),
        *_texts("revoked_at", null=True),
        sa.UniqueConstraint("name"),
    )


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", _ID, primary_key=True, autoincrement=False),
        *_texts("at", "actor", "action", "subject", "detail", "previous", "hash"),
    )
    op.create_index("ix_audit_subject", "audit", ["subject", "seq"])
    if op.get_bind().dialect.name == "sqlite":
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_no_{event.lower()} BEFORE {event} ON audit "
                f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_only_grows BEFORE UPDATE OR DELETE ON audit "
        "FOR EACH ROW EXECUTE FUNCTION audit_refuse()"
    )
    op.execute(
        "CREATE TRIGGER audit_never_emptied BEFORE TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()"
    )
