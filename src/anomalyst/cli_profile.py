"""The command `anomalyst profile`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anomalyst.cli_options import Device, Json, Preset, Settings, Weights
from anomalyst.cli_profile_runtime import (
    OfExport,
    Picture,
    RuntimeEngine,
    Threads,
    as_time,
    profile_export,
    write_profile,
)
from anomalyst.console import progress, show_json, show_table
from anomalyst.errors import InputError
from anomalyst.files import make_folder

if TYPE_CHECKING:
    from anomalyst.profiling_record import Parameters, Peak, Profile, SizeProfile


RandomWeights = Annotated[
    bool,
    typer.Option("--random-weights", help="Draw the backbone's weights: they cost the same."),
]
ImageSizes = Annotated[
    list[int] | None,
    typer.Option("--image-size", min=1, help="Side in pixels (default: its own); repeatable."),
]
BatchSizes = Annotated[
    list[int] | None,
    typer.Option("--batch-size", min=1, help="Images judged together (1 and 8); repeatable."),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Training steps to time (default: 5).")]
ProfileFolder = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder for profile.json.")
]

_OF_EXPORT = ("engine", "threads", "picture")  # options that ask for --runtime
_OF_BOTH = ("runtime", "method", "batch_size", "output", "as_json")


def profile(
    context: typer.Context,
    method: Annotated[
        str, typer.Argument(help="A method, see `anomalyst methods`; with --runtime an export.")
    ],
    runtime: OfExport = False,
    engine: RuntimeEngine = "auto",
    threads: Threads = None,
    picture: Picture = None,
    backbone: Annotated[str, typer.Option(help="See `anomalyst backbones`.")] = "auto",
    weights: Weights = None,
    random_weights: RandomWeights = False,
    image_size: ImageSizes = None,
    batch_size: BatchSizes = None,
    shots: Annotated[int, typer.Option(min=1, help="References a category.")] = 4,
    categories: Annotated[int, typer.Option(min=1, help="Categories that are enrolled.")] = 1,
    steps: Steps = None,
    preset: Preset = None,
    settings: Settings = None,
    device: Device = "auto",
    output: ProfileFolder = None,
    as_json: Json = False,
) -> None:
    """Measure what a method costs here, on made-up images: flops, time, memory, size."""
    _require_fitting(context, method, runtime)
    batches = batch_size or (1, 8)
    if runtime:
        profile_export(method, engine, threads or (), picture, batches, output, as_json)
        return
    from anomalyst.profiling import profile as measure
    from anomalyst.settings import detector_settings

    if output is not None:
        make_folder(output)
    chosen = detector_settings(method, preset, settings or [], backbone)
    with progress() as tell:
        found = measure(
            method,
            settings={**chosen, "weights": weights, "device": device},
            image_sizes=image_size or (),
            batch_sizes=batches,
            shots=shots,
            categories=categories,
            steps=steps,
            random=random_weights,
            progress=tell,
        )
    show_json(found.to_dict()) if as_json else _show(found)
    if output is not None:
        write_profile(found.to_dict(), output, as_json)


def _require_fitting(context: typer.Context, method: str, runtime: bool) -> None:
    """Raise where an option was given that says nothing of what is measured."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in _OF_BOTH or source is None or source.name != "COMMANDLINE":
            continue
        if runtime and option.name not in _OF_EXPORT:
            raise InputError(
                f"{option.opts[0]} is of a method: an exported bundle is measured as it is; omit it"
            )
        if not runtime and option.name in _OF_EXPORT:
            raise InputError(
                f"{option.opts[0]} is of an exported bundle: name one, and add --runtime"
            )
    from anomalyst.runtime.exported import is_export

    if not runtime and is_export(Path(method)):
        raise InputError(f"{method} is an exported bundle: add --runtime")


def _show(found: Profile) -> None:
    """Print what there is once a size, then the times of judging."""
    threads = f", {found.environment['threads']} threads" if found.device == "cpu" else ""
    print(f"{found.method} on {found.backbone}, {found.device}{threads}")
    if found.note:
        print(found.note)
    print()
    each_size = [[*_parameters(found.parameters), *_costs(size)] for size in found.sizes]
    rows = [[same[0][0], *(text for _, text in same)] for same in zip(*each_size, strict=True)]
    show_table(["", *(f"{size.image_size} px" for size in found.sizes)], rows)
    print()
    columns = ["judging", "batch", "one image", "backbone alone", "ratio", "memory"]
    show_table(columns, [row for size in found.sizes for row in _times(size)])


def _parameters(counts: Parameters) -> Iterator[tuple[str, str]]:
    yield "parameters of the backbone, frozen", _millions(counts.backbone)
    yield "parameters of the method", _millions(counts.method)
    if counts.trained != counts.method:
        yield "of these trained", _millions(counts.trained)


def _costs(size: SizeProfile) -> Iterator[tuple[str, str | None]]:
    """Yield each figure that stands once a size, in words and with its unit."""
    yield "one image, flops of the backbone", _flops(size.backbone_flops)
    yield "one image, flops of the method beyond that", _flops(size.method_flops)
    if training := size.training:
        yield f"one training step (batch of {training.batch_size})", as_time(training.step)
        yield "one training step, flops", _flops(training.flops)
        yield "training, memory", _memory(training.memory)
    if enrolment := size.enrolment:
        count = f"{enrolment.normal} good"
        count += f" and {enrolment.abnormal} bad" if enrolment.abnormal else ""
        yield f"enrolling one reference (of {count})", as_time(enrolment.reference)
        yield "enrolling, memory", _memory(enrolment.memory)
    yield "bundle on disk", f"{size.bundle['total'] / 1e6:.1f} MB"


def _times(size: SizeProfile) -> Iterator[list[object]]:
    for each in size.judging:
        times, memory = (as_time(each.image), as_time(each.backbone)), _memory(each.memory)
        yield [f"{size.image_size} px", each.batch_size, *times, f"{each.ratio:.2f}", memory]


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} million" if count else "none"


def _flops(count: int) -> str:
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e6:.2f} MFLOP"


def _memory(peak: Peak) -> str | None:
    parts = [] if peak.host_mb is None else [f"{peak.host_mb:.0f} MB"]
    parts += [] if peak.gpu_mb is None else [f"GPU {peak.gpu_mb:.0f} MB"]
    return ", ".join(parts) or None
