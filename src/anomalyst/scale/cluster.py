"""A Ray cluster to work on: one of this machine's own, or one that runs already."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import anomalyst
from anomalyst.errors import InputError
from anomalyst.scale import scale_module

# What travels through the store are lists of names; Ray's default is a third of the memory.
_STORE_BYTES = 2**28
_PATIENCE = 5  # seconds that a cluster may take to answer


@contextmanager
def connect(address: str | None = None) -> Iterator[None]:
    """Connect to a Ray cluster, and leave it when the work is done.

    Workers import anomalyst from where this process has it, if that folder is there.

    Parameters
    ----------
    address
        ``HOST:PORT`` of a running cluster, or ``auto`` for the one that this machine belongs to.
        None starts one on this machine, reachable from nowhere else (unless ray was imported
        before), and ends it afterwards. In a process that is connected already, None is that
        cluster, and it stays connected.

    Raises
    ------
    InputError
        Ray is missing, or there is no cluster at the address.
    """
    ray = load_ray(address)
    with _environment(address):
        connected = ray.is_initialized()
        if connected and address is not None:
            raise InputError(f"--address {address}: this process is connected to a cluster already")
        if not connected:
            _start(ray, address)
    try:
        with _results_only():
            yield
    finally:
        if not connected:
            ray.shutdown()


def load_ray(address: str | None = None) -> Any:
    """Return the module ``ray``, imported in the way that `connect` needs.

    Raises
    ------
    InputError
        Ray is missing.
    """
    with _environment(address):
        return scale_module("ray")


def _start(ray: Any, address: str | None) -> None:
    wanted: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        wanted |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    else:
        wanted["runtime_env"] = {"env_vars": {"PYTHONPATH": _path("${PYTHONPATH}")}}
    try:
        _require_answer(address or "")
        with _silence():
            ray.init(address=address or "local", **wanted)
    except (OSError, RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        if address is None:
            raise InputError(f"Ray does not start on this machine: {words}") from error
        raise InputError(f"--address {address}: no Ray cluster answers there ({words})") from error


def _require_answer(address: str) -> None:
    """Raise `OSError` where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()


@contextmanager
def _silence() -> Iterator[None]:
    """Keep off the terminal what Ray's core says when it starts; its failures are exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _environment(address: str | None) -> Iterator[None]:
    """Set what Ray and the processes that it starts read from the environment."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Its core logs an error at every start of an actor pool, which is none.
        "RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal"),
    }
    if address is None:
        wanted["PYTHONPATH"] = _path(os.environ.get("PYTHONPATH", ""))
        # Read when ray is imported: it then takes 127.0.0.1, as by default it does off Linux only.
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _path(rest: str) -> str:
    """Return a search path that begins with the folder from which anomalyst is imported here."""
    home = str(Path(anomalyst.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, (home, rest)))


@contextmanager
def _results_only() -> Iterator[None]:
    """Move to stderr what Ray's own threads print to stdout, such as that a worker was lost."""
    before = sys.stdout
    sys.stdout = cast(TextIO, _WithoutRay(before))
    try:
        yield
    finally:
        sys.stdout = before


class _WithoutRay:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        from_ray = threading.current_thread().name.startswith("ray_")
        return (sys.stderr if from_ray else self._stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@dataclass(frozen=True)
class Share:
    """How many workers there are, and the processor cores and GPUs of each."""

    workers: int
    cpus: int
    gpus: int = 0


def share_out(workers: int | None = None, device: str = "auto") -> Share:
    """Divide the connected cluster among workers, all alike.

    Parameters
    ----------
    workers
        How many; by default one for each GPU, or without GPUs for each core.
    device
        ``auto`` (GPUs if there are some), ``cpu`` or ``cuda``. Ray gives each worker its GPU.

    Raises
    ------
    InputError
        The cluster has no room for so many, no GPU, or the device is none of these.
    """
    ray = scale_module("ray")
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in found]
    return divide(nodes, workers, device)


def divide(nodes: Sequence[tuple[int, int]], workers: int | None, device: str) -> Share:
    """Return the largest equal share of nodes with (cores, GPUs) each; see `share_out`."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: on Ray give auto, cpu or cuda")
    gpus = sum(gpu for _, gpu in nodes)
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    most = sum(min(cpu, gpu) if on_gpu else cpu for cpu, gpu in nodes)
    count = workers or most
    if not 0 < count <= most:
        have = f"{sum(cpu for cpu, _ in nodes)} cores and {gpus} GPUs"
        kind = "a core and a GPU" if on_gpu else "a core"
        raise InputError(f"the cluster has {have}: room for {most} workers with {kind} each")
    cpus = max(
        each
        for each in range(1, max(cpu for cpu, _ in nodes) + 1)
        if sum(min(cpu // each, gpu) if on_gpu else cpu // each for cpu, gpu in nodes) >= count
    )
    return Share(count, cpus, int(on_gpu))
