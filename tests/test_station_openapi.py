"""The OpenAPI is true, and nothing that fits it or nearly fits it makes an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")
pytest.importorskip("schemathesis")

import socket
import threading

import schemathesis
import uvicorn
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.failures import FailureGroup

from anomalyst.station.app import create_app
from anomalyst.station.schemas import ERRORS
from station_parts import API, bad, client_of, plain, send, settings

_CHECKS = ("status_code", "content_type", "response_schema")
_calm = hypothesis_settings(
    max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The schema of a running station that holds two inspections."""
    made = settings(tmp_path_factory.mktemp("openapi"))
    with client_of(made) as client:
        send(client, plain())
        send(client, bad())
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(made), log_level="error"))
    running = threading.Thread(target=server.run, args=([listening],))
    running.start()
    port = listening.getsockname()[1]
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}{API}/openapi.json")
    server.should_exit = True
    running.join()


@pytest.mark.slow
def test_no_request_makes_an_error_of_ours(api: Any) -> None:
    named = [schemathesis.checks.CHECKS.get_one(f"{name}_conformance") for name in _CHECKS]
    wrong: list[str] = []

    def ask(case: Any) -> None:
        answer = case.call(timeout=60)
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        case.validate_response(answer, checks=named)

    tried = 0
    for found in api.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            tried += 1
            cases = operation.as_strategy(generation_mode=mode)
            try:
                _calm(given(case=cases)(ask))()
            except Unsatisfiable:  # nothing wrong can be sent there
                continue
            except (Exception, FailureGroup) as error:
                wrong.append(f"{operation.label} ({mode.value}): {error}")
    assert wrong == [], "\n\n".join(wrong)
    assert tried >= 40


def test_every_route_tells_of_its_errors(tmp_path: Path) -> None:
    with client_of(settings(tmp_path)) as client:
        described = client.get(f"{API}/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            if path == "/healthz":
                continue
            said = set(operation["responses"])
            assert {str(code) for code in ERRORS} <= said, (method, path)
            (content,) = operation["responses"]["422"]["content"].values()
            assert content["schema"] == {"$ref": "#/components/schemas/Error"}
            assert operation["security"], (method, path)
    assert described["info"]["title"] == "anomalyst station"
