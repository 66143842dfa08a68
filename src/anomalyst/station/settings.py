"""Where a station keeps its things and what it allows."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """All that `create_app` must be told.

    Attributes
    ----------
    data
        Folder of everything but, with ``url``, the database.
    url
        SQLAlchemy's URL of the database; SQLite in ``data`` by default.
    bundles
        Bundles or exports, folders or ``.zip``, each a recipe.
    watch
        Folders to watch from the start, judged by the first bundle's recipe.
    max_image, max_batch, max_recipe, max_buffered
        Bytes of one picture, of a batch, of an uploaded bundle, of all bodies read at a time.
    max_pixels
        Of one picture, by its header.
    waiting
        Pictures that may wait to be judged.
    rate, burst
        Requests a second of one caller, and how many at once.
    watch_seconds
        Between two looks at a watched folder: a file must stand still for as long.
    """

    data: Path = Path("station")
    url: str | None = None
    bundles: tuple[Path, ...] = ()
    watch: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    max_image: int = 64 * MIB
    max_batch: int = 512 * MIB
    max_batch_images: int = 256
    max_recipe: int = 4096 * MIB
    max_buffered: int = 1024 * MIB
    max_pixels: int = 100_000_000
    waiting: int = 64
    rate: float = 100.0
    burst: int = 400
    watch_seconds: float = 1.0

    @property
    def database_url(self) -> str:
        """The URL of the database."""
        return self.url or f"sqlite:///{self.data.resolve() / 'station.db'}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the station."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
