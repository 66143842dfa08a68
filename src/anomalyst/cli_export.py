"""The command `anomalyst export`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from anomalyst.cli_options import Bundle, Json
from anomalyst.console import say, show_json
from anomalyst.errors import InputError


def export(
    bundle: Bundle,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Exported bundle: folder or .zip.")
    ],
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Real images, or a folder of them, to compare with torch; repeatable."),
    ] = None,
    format: Annotated[str, typer.Option(help="onnx or openvino.")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Compute in int8; --images must hold defects then.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH of the network's input (default: any, if possible)."),
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(help="Only this category, or a name to judge by; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make of a bundle one graph that needs no torch, and check that it scores alike."""
    from anomalyst.export import export_bundle

    given: dict[str, Any] = {"size": _size(size), "categories": category}
    path = export_bundle(
        bundle, output, images or [], format=cast(Any, format), int8=int8, tell=say, **given
    )
    parity = _parity(path)
    if as_json:
        show_json({"exported": str(path), "parity": parity})
        return
    if parity["int8_layers"]:
        some, every = parity["int8_layers"]
        say(f"{some} of {every} layers in int8, rank correlation {parity['spearman']:.4f}")
    say(
        f"{parity['images']} images: map within {parity['max_map_error']:.1e}, score within "
        f"{parity['max_score_error']:.1e} of torch, {parity['verdicts_flipped']} verdicts differ"
    )
    print(path)


def _parity(path: Path) -> dict[str, Any]:
    from anomalyst.runtime.exported import MANIFEST, PARITY
    from anomalyst.sealed import file_reader

    found: dict[str, Any] = json.loads(file_reader(path, MANIFEST)(PARITY))
    return found


def _size(text: str | None) -> tuple[int, int] | None:
    """Return height and width of ``HEIGHTxWIDTH``."""
    if text is None:
        return None
    if (found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)) is None:
        raise InputError(f"--size {text!r}: give HEIGHTxWIDTH in pixels, such as 280x392")
    return int(found[1]), int(found[2])
