"""The command `anomalyst benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anomalyst.benchmark import shipped
from anomalyst.cli_options import Device, Json, Weights
from anomalyst.console import progress, say, show_json, show_table

_SHIPPED = ", ".join(shipped())


def benchmark(
    config: Annotated[str, typer.Argument(help=f"A YAML file, or a shipped one: {_SHIPPED}.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="Training data, not the config's; repeatable.")
    ] = None,
    test: Annotated[
        list[Path] | None, typer.Option(help="Test data, not the config's; repeatable.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps, not the config's.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="A name from `anomalyst backbones`, not the config's.")
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
    feature_cache: Annotated[
        Path | None, typer.Option(help="Keep frozen features here (default: OUTPUT/features).")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Forbid downloads.")] = False,
    as_json: Json = False,
) -> None:
    """Measure methods and variants over seeds and categories: results.csv and results.md."""
    from anomalyst.benchmark.config import load_config
    from anomalyst.benchmark.machine import Machine
    from anomalyst.benchmark.runner import run_benchmark
    from anomalyst.benchmark.tables import columns, rows_of

    instead: dict[str, Any] = {"steps": steps, "backbone": backbone, "weights": weights}
    wanted = load_config(config, data=data or (), test=test or (), **instead)
    machine = Machine(device, offline, feature_cache)
    outcomes = run_benchmark(wanted, output, machine, watch=progress, tell=say)
    rows = rows_of(outcomes)
    if as_json:
        show_json({"title": wanted.title, "results": [row.summary() for row in rows]})
    else:
        show_table(columns(rows), [row.texts() for row in rows])
        print(output / "results.md")
    if any(outcome.error is not None for outcome in outcomes):
        raise typer.Exit(2)
