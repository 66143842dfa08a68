"""The command `anomalyst benchmark`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anomalyst.benchmark import shipped
from anomalyst.cli_options import Address, Device, EngineName, Json, Weights
from anomalyst.console import progress, say, show_json, show_table
from anomalyst.errors import InputError

if TYPE_CHECKING:
    from anomalyst.benchmark.cells import Outcome
    from anomalyst.benchmark.config import Benchmark
    from anomalyst.benchmark.runner import Engine

_SHIPPED = ", ".join(shipped())


Data = Annotated[
    list[Path] | None, typer.Option(help="Training data, not the config's; repeatable.")
]
Test = Annotated[list[Path] | None, typer.Option(help="Test data, not the config's; repeatable.")]
Root = Annotated[
    Path | None, typer.Option(help="Where the config's relative folders lie (default: here).")
]
SkipMissing = Annotated[
    bool, typer.Option("--skip-missing", help="Leave out parts whose data is not there.")
]
BackboneName = Annotated[
    str | None, typer.Option(help="A name from `anomalyst backbones`, not the config's.")
]
Features = Annotated[
    Path | None, typer.Option(help="Keep frozen features here (default: OUTPUT/features).")
]
Cpus = Annotated[int, typer.Option(min=1, help="Ray: processor cores that a model needs.")]
Gpus = Annotated[float, typer.Option(min=0, help="Ray: GPUs that a model needs, 0.5 too.")]


def benchmark(
    config: Annotated[str, typer.Argument(help=f"A YAML file, or a shipped one: {_SHIPPED}.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")],
    root: Root = None,
    data: Data = None,
    test: Test = None,
    skip_missing: SkipMissing = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps, not the config's.")
    ] = None,
    backbone: BackboneName = None,
    weights: Weights = None,
    device: Device = "auto",
    engine: EngineName = "plain",
    address: Address = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0,
    feature_cache: Features = None,
    offline: Annotated[bool, typer.Option("--offline", help="Forbid downloads.")] = False,
    as_json: Json = False,
) -> None:
    """Measure methods and variants over seeds and categories: a table, a page, every figure."""
    from anomalyst.benchmark.machine import Machine
    from anomalyst.benchmark.reading import load_benchmark, present
    from anomalyst.benchmark.runner import run_benchmark

    instead: dict[str, Any] = {"steps": steps, "backbone": backbone, "weights": weights}
    wanted = load_benchmark(config, root=root, data=data or (), test=test or (), **instead)
    wanted = present(wanted, say if skip_missing else None)
    machine = Machine(device, offline, feature_cache)
    run_by = _engine(engine, address, cpus, gpus)
    outcomes = run_benchmark(wanted, output, machine, engine=run_by, tell=say)
    _show(wanted, outcomes, as_json)
    if not as_json:
        print(output / "results.html")
    if any(outcome.error is not None for outcome in outcomes):
        raise typer.Exit(2)


def _engine(name: str, address: str | None, cpus: int, gpus: float) -> Engine:
    """Return what runs the models."""
    from anomalyst.benchmark.runner import one_by_one

    if name == "ray":
        from anomalyst.scale.cells import on_ray

        return on_ray(address, cpus=cpus, gpus=gpus)
    if address or gpus or cpus != 1:
        raise InputError("--address, --cpus and --gpus are of a Ray cluster: add --engine ray")
    return one_by_one(progress)


def _show(wanted: Benchmark, outcomes: Sequence[Outcome], as_json: bool) -> None:
    """Print a table for each part, or all rows as JSON."""
    from anomalyst.benchmark.rows import rows_of
    from anomalyst.benchmark.tables import main_table

    rows = rows_of(outcomes)
    if as_json:
        show_json({"title": wanted.title, "results": [row.summary() for row in rows]})
        return
    for part in wanted.parts:
        table = main_table([row for row in rows if row.part == part.name], part)
        if part.name:
            print(f"\n{part.name}")
        show_table(table.heads, table.rows)
