"""The service: `create_app` puts routes, limits and errors together around a `Station`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomalyst.station import (
    golden,
    routes_inspections,
    routes_quality,
    routes_recipes,
    routes_station,
)
from anomalyst.station.access import Gate
from anomalyst.station.core import Station
from anomalyst.station.limits import BodyLimit
from anomalyst.station.metrics import Metrics
from anomalyst.station.refusals import answer_errors
from anomalyst.station.schemas import ERRORS, PREFIX
from anomalyst.station.settings import Settings

_PAGE = Path(__file__).parent / "page"


def create_app(settings: Settings) -> FastAPI:
    """Open a station and return its service; it judges and watches while the service runs.

    Raises
    ------
    InputError
        See `Station`.
    """
    station = Station(settings)
    station.checks.append(golden.require)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(station.start)
        try:
            yield
        finally:
            await run_in_threadpool(station.close)

    app = FastAPI(
        title="anomalyst station",
        version=metadata.version("anomalyst"),
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,  # its page would load scripts from the internet
        redoc_url=None,
        lifespan=running,
    )
    app.state.station = station
    answer_errors(app)
    api = APIRouter(prefix=PREFIX, responses=ERRORS)
    for router in (
        routes_station.router,
        routes_recipes.router,
        routes_quality.router,
        routes_inspections.exports,
        routes_inspections.router,
    ):
        api.include_router(router)
    app.include_router(api)
    app.include_router(routes_station.root)
    _serve_page(app)
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(_Counted, metrics=station.metrics)
    return app


def _serve_page(app: FastAPI) -> None:
    """Serve the page's own files and nothing else."""
    if not _PAGE.is_dir():
        return
    app.mount("/page", StaticFiles(directory=_PAGE), name="page")

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")


class _Counted:
    """Counts answers by their status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
