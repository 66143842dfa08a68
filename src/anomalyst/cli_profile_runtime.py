"""`anomalyst profile --runtime`: what judging by an exported bundle costs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anomalyst.console import progress, say, show_json, show_table
from anomalyst.errors import InputError
from anomalyst.files import make_folder, replace_file

if TYPE_CHECKING:
    from anomalyst.profiling_record import RuntimeProfile, RuntimeTimes, Spread

Engines = Literal["auto", "onnxruntime", "openvino"]
OfExport = Annotated[
    bool, typer.Option("--runtime", help="Time an exported bundle stage by stage; needs no torch.")
]
RuntimeEngine = Annotated[
    Engines, typer.Option("--engine", help="With --runtime: what runs the network.")
]
Threads = Annotated[
    list[int] | None,
    typer.Option(min=1, help="With --runtime: of the network (its own choice); repeatable."),
]
Picture = Annotated[
    str | None,
    typer.Option(metavar="WIDTHxHEIGHT", help="With --runtime: of the pictures (1600x1200)."),
]

_STAGES = {
    "decode": "decode a JPEG",
    "preprocess": "preprocess",
    "graph": "graph",
    "judging": "judge",
    "from_file": "all of it, from a file",
    "from_pixels": "all of it, from pixels",
}


def profile_export(
    export: str,
    engine: Engines,
    threads: Sequence[int],
    picture: str | None,
    batches: Sequence[int],
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure an exported bundle, print and write what was found."""
    from anomalyst.runtime.profiling import profile_runtime

    size = _picture(picture)
    if output is not None:
        make_folder(output)
    with progress() as tell:
        found = profile_runtime(
            export,
            engine=engine,
            threads=threads,
            batch_sizes=batches,
            picture=size,
            progress=tell,
        )
    show_json(found.to_dict()) if as_json else _show(found)
    if output is not None:
        write_profile(found.to_dict(), output, as_json)


def write_profile(found: Mapping[str, Any], folder: Path, as_json: bool) -> None:
    """Write ``profile.json`` into a folder, and say where it is."""
    path = folder / "profile.json"
    try:
        replace_file(path, json.dumps(found, indent=2, ensure_ascii=False).encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another") from None
    say(str(path)) if as_json else print(path)


def as_time(spread: Spread) -> str:
    """Return the median, and the quartiles in brackets."""
    unit, scale, digits = ("s", 1, 2) if spread.median >= 1 else ("ms", 1000, 1)
    low, median, high = (
        f"{seconds * scale:.{digits}f}" for seconds in (spread.low, spread.median, spread.high)
    )
    return f"{median} {unit} ({low} to {high})"


def _picture(text: str | None) -> tuple[int, int] | None:
    """Return width and height of ``WIDTHxHEIGHT``."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise InputError(f"--picture {text!r}: give WIDTHxHEIGHT in pixels, such as 1600x1200")
    return int(found[1]), int(found[2])


def _show(found: RuntimeProfile) -> None:
    """Print the time of each stage, then what comes once a process and once a defect."""
    kind = f"{found.format}, int8" if found.int8 else found.format
    print(f"{found.export}: {found.method}, {kind}, {found.engine}")
    width, height = found.picture
    inputs = ", ".join(
        f"{n} x {w}x{h}" if n > 1 else f"{w}x{h}" for n, h, w in found.network_inputs
    )
    size = f"{found.picture_bytes / 1e3:.0f} kB"
    print(f"pictures of {width}x{height}, {size}; in the network {inputs}")
    print()
    columns = [_column(times) for times in found.times]
    rows = [
        [words, *(as_time(getattr(times, name)) for times in found.times)]
        for name, words in _STAGES.items()
    ]
    show_table(["one picture", *columns], rows)
    print()
    show_table(["", "cost"], list(_once(found)))


def _column(times: RuntimeTimes) -> str:
    words = f"batch {times.batch_size}"
    if times.threads is None:
        return words
    return f"{words}, {times.threads} thread" + ("s" if times.threads > 1 else "")


def _once(found: RuntimeProfile) -> Iterator[list[object]]:
    words = ("the map at the picture's size", "regions in it", "an overlay as PNG")
    for field, text in zip(fields(found.drawing), words, strict=True):
        yield [f"where asked for: {text}", as_time(getattr(found.drawing, field.name))]
    yield ["a cold start: process to first result", as_time(found.cold.started)]
    yield ["of it loading the export", as_time(found.cold.loaded)]
    for batch, peak in found.cold.memory_mb.items():
        memory = None if peak is None else f"{peak:.0f} MB"
        yield [f"memory of the process, batch {batch}", memory]
