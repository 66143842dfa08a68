"""The commands `anomalyst weights ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anomalyst.console import show_json, show_table

weights_app = typer.Typer(
    help="Backbone weights, also for machines without internet.", no_args_is_help=True
)


@weights_app.command("list")
def weights_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """List every backbone's weights: where they are, or that they are missing."""
    from anomalyst.features.weights import list_weights

    rows = list_weights()
    if as_json:
        show_json(rows)
        return
    show_table(list(rows[0]), [list(row.values()) for row in rows])


@weights_app.command("fetch")
def weights_fetch(backbone: Annotated[str, typer.Argument(help="A backbone id.")]) -> None:
    """Download a backbone's weights into the local hub cache."""
    from anomalyst.features.weights import fetch

    print(fetch(backbone))


@weights_app.command("pack")
def weights_pack(
    backbone: Annotated[str, typer.Argument(help="A backbone id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to carry.")],
) -> None:
    """Write a backbone's weights to one file, to carry to a machine without internet."""
    from anomalyst.features.weights import pack

    print(pack(backbone, output))


@weights_app.command("add")
def weights_add(
    file: Annotated[Path, typer.Argument(help="A file that `weights pack` wrote, or safetensors.")],
    backbone: Annotated[
        str | None, typer.Option(help="Its backbone id (default: what the file says).")
    ] = None,
) -> None:
    """Put weights from a file into the local store of this machine."""
    from anomalyst.features.weights import add

    print(add(file, backbone))
