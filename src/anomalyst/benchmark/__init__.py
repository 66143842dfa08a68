"""Protocols, methods, variants, shots, seeds and categories to a table of figures."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "configs"


def shipped() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))
