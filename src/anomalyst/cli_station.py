"""The commands `anomalyst serve`, `anomalyst key` and `anomalyst audit`."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anomalyst.cli_options import Device, Json
from anomalyst.console import say, show_json, show_table
from anomalyst.errors import InputError
from anomalyst.files import make_folder

if TYPE_CHECKING:
    from fastapi import FastAPI

    from anomalyst.station.database import Database

DataFolder = Annotated[
    Path, typer.Option("--data", help="The station's folder: pictures, recipes, database.")
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="URL",
        envvar="ANOMALYST_DB",
        help="postgresql+psycopg://USER:PASSWORD@HOST/NAME (default: SQLite in the folder).",
    ),
]
_DATA = Path("station")
_MISSING = "the station needs {name}; install it with: pip install 'anomalyst[station]'"

key_app = typer.Typer(help="API keys of the station.", no_args_is_help=True)
audit_app = typer.Typer(help="The station's audit log.", no_args_is_help=True)


def serve(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(help="Bundles or exports, folders or .zip; each is a recipe."),
    ] = None,
    data: DataFolder = _DATA,
    db: DatabaseUrl = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    watch: Annotated[
        list[Path] | None,
        typer.Option(help="Folder where a camera writes, judged by the first recipe; repeatable."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Run the inspection station: a page for people, a REST service for machines."""
    with _extra():
        import uvicorn  # noqa: F401

        from anomalyst.station.app import create_app
        from anomalyst.station.settings import Settings

    given = (tuple(bundles or ()), tuple(watch or ()))
    settings = Settings(data, db, *given, host=host, port=port, device=device)
    app = create_app(settings)
    try:
        listening = _listen(host, port)
    except BaseException:
        app.state.station.close()
        raise
    # Each record holds its likeness to the references: no line of the log for every odd part.
    logging.getLogger("anomalyst.judging").setLevel(logging.ERROR)
    port = listening.getsockname()[1]
    say(f"station: http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)")
    _run(app, listening)


def _run(app: FastAPI, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish what is in hand."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        proxy_headers=False,  # else X-Forwarded-For could make a program here pass for another
        server_header=False,
        timeout_graceful_shutdown=20,
        limit_concurrency=512,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}, port {port} ({error.strerror}): name another --port or "
            "--host"
        ) from None


@key_app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is; stands in the audit log.")],
    role: Annotated[str, typer.Option(help="viewer, operator or engineer.")],
    data: DataFolder = _DATA,
    db: DatabaseUrl = None,
) -> None:
    """Make a key and print it, this once."""
    with _extra():
        from anomalyst.station.keys import add_key

    make_folder(data)  # the first key comes before the first start
    with _open(data, db) as database:
        print(add_key(database, name, role, "command line"))
    say(f"the key of {name} ({role}); it is not shown again. Send it as X-API-Key.")


@key_app.command("list")
def show(data: DataFolder = _DATA, db: DatabaseUrl = None, as_json: Json = False) -> None:
    """List keys, never their secrets."""
    with _extra():
        from anomalyst.station.keys import list_keys

    with _open(data, db) as database, database.read() as session:
        rows = list_keys(session)
    if as_json:
        show_json(rows)
    else:
        columns = ["name", "role", "created_at", "revoked_at"]
        show_table(columns, [[row[name] for name in columns] for row in rows])


@key_app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="Name of the key.")],
    data: DataFolder = _DATA,
    db: DatabaseUrl = None,
) -> None:
    """End a key, at once."""
    with _extra():
        from anomalyst.station.keys import revoke_key

    with _open(data, db) as database:
        revoke_key(database, name, "command line")
    say(f"{name}: revoked")


@audit_app.command("verify")
def verify(data: DataFolder = _DATA, db: DatabaseUrl = None, as_json: Json = False) -> None:
    """Check that no row of the log, inspection or decision was changed, removed or put in."""
    with _extra():
        from anomalyst.station.verification import verify as walk

    with _open(data, db) as database:
        found = walk(database)
    if as_json:
        show_json({"ok": found.ok, **vars(found)})
    else:
        for fault in found.faults:
            say(f"fault: {fault}")
        print(
            f"{found.rows} rows, {found.inspections} inspections: "
            f"{'whole' if found.ok else f'{len(found.faults)} faults'}; newest hash {found.head}"
        )
    if not found.ok:
        raise typer.Exit(2)


class _extra:
    """Says which extra an import needs; the command line would name another one."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ImportError) and not str(error.name).startswith("anomalyst"):
            raise InputError(_MISSING.format(name=error.name)) from error


class _open:
    """Opens a station's database for one command."""

    def __init__(self, data: Path, db: str | None) -> None:
        self._data = data
        self._db = db

    def __enter__(self) -> Database:
        from anomalyst.station.database import Database
        from anomalyst.station.settings import Settings

        settings = Settings(data=self._data, url=self._db)
        if not self._data.is_dir():
            raise InputError(f"{self._data}: no such folder; name the station's with --data")
        self._database = Database(settings.database_url, self._data / "audit.head")
        return self._database

    def __exit__(self, *_: object) -> None:
        self._database.close()
