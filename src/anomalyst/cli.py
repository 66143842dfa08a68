"""The command line: thin commands, every one a call that the Python API has too."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from anomalyst.cli_benchmark import benchmark
from anomalyst.cli_export import export
from anomalyst.cli_fit import fit, make_cache, tell_state
from anomalyst.cli_options import (
    Address,
    Alpha,
    AlphaReview,
    AnyBundle,
    Bundle,
    CacheFolder,
    Categories,
    Data,
    Device,
    EngineName,
    Json,
    Layout,
    Workers,
)
from anomalyst.cli_profile import profile
from anomalyst.cli_station import audit_app, key_app, serve
from anomalyst.cli_synthesis import pseudo_anomalies
from anomalyst.cli_weights import weights_app
from anomalyst.console import progress, say, show_json, show_metrics, show_table
from anomalyst.errors import InputError
from anomalyst.files import make_folder

app = typer.Typer(
    name="anomalyst",
    help="Find visual defects from a few good images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="First steps: anomalyst demo. Any command takes --help and --debug (full traceback).",
)
app.add_typer(weights_app, name="weights")
app.add_typer(key_app, name="key")
app.add_typer(audit_app, name="audit")

_STOPPED = 130  # exit code of Ctrl-C


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")] = Path(
        "out/demo"
    ),
    shots: Annotated[int, typer.Option(help="Good cells of each kind to compare with.")] = 16,
    as_json: Json = False,
) -> None:
    """Find defects on real solar cells: fit, calibrate, predict, report."""
    from anomalyst.demo import run_demo

    make_folder(output)
    metrics, report = run_demo(output, shots)
    show_json(metrics) if as_json else show_metrics(metrics)
    say(f"report: {report}")


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods and what each can do and needs."""
    from anomalyst.methods.base import methods as registered

    rows = registered()
    if as_json:
        show_json(rows)
        return
    columns = [key for key in rows[0] if key != "summary"]
    show_table(columns, [[row[key] for key in columns] for row in rows])
    for row in rows:
        print(f"{row['name']}: {row['summary']}")


@app.command()
def backbones(as_json: Json = False) -> None:
    """List the backbones and which of them work here without a download."""
    from anomalyst.features.backbones import backbones as known

    rows = known()
    if as_json:
        show_json(rows)
        return
    columns = list(rows[0])
    show_table(columns, [[row[key] for key in columns] for row in rows])


app.command()(fit)


def _keep(detector: Any, bundle: Path, as_json: bool) -> None:
    """Save the detector, and tell where it is and what it can promise."""
    detector.save(bundle)
    tell_state(detector, bundle, as_json)


@app.command()
def enroll(
    bundle: Annotated[
        Path,
        typer.Argument(
            help="Bundle or export to add to; a new name starts from the generalist that "
            "ships here."
        ),
    ],
    category: Annotated[str, typer.Argument(help="The product; a new one or one it knows.")],
    normal: Annotated[
        list[Path] | None, typer.Option(help="Good image or folder; repeatable.")
    ] = None,
    abnormal: Annotated[
        list[Path] | None, typer.Option(help="Image of a known defect; repeatable.")
    ] = None,
    mask: Annotated[
        list[Path] | None,
        typer.Option(help="Mask of each --abnormal, in the same order (default: found)."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Teach a bundle a product, or a defect of one: seconds, no training."""
    from anomalyst.bundle import check_destination
    from anomalyst.data.images import list_images

    bad, masks = abnormal or [], mask or []
    if masks and len(masks) != len(bad):
        raise InputError(f"{len(bad)} --abnormal but {len(masks)} --mask: give one mask for each")
    images = [path for given in normal or [] for path in list_images(given)]
    pairs = [(path, masks[k] if masks else None) for k, path in enumerate(bad)]
    new = not bundle.exists()
    if new and find_spec("torch") is None:
        raise InputError(f"{bundle}: no such exported bundle, and new ones need anomalyst[train]")
    if new:
        from anomalyst.generalist import load_generalist

        check_destination(bundle)
        detector = load_generalist(device=device)
    else:
        detector = _open(bundle, device)
    with progress() as advance:
        _teach(detector, category, images, pairs, advance)
    if new:
        say(f"{bundle}: new, from the generalist that ships with anomalyst (nagl)")
    _keep(detector, bundle, as_json)


def _teach(judge: Any, category: str, images: Any, pairs: Any, advance: Any) -> None:
    """Enroll in a detector, or in the runtime of an export."""
    from anomalyst.runtime import Runtime

    if not isinstance(judge, Runtime):
        judge.enroll(category, images, pairs, advance)
    elif pairs:
        raise InputError("an export learns good images only: give --abnormal to the bundle")
    else:
        judge.enroll(category, images, advance)


@app.command()
def calibrate(
    bundle: AnyBundle,
    data: Data,
    category: Categories = None,
    layout: Layout = None,
    alpha: Alpha = None,
    alpha_review: AlphaReview = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Calibrate a bundle on good images that are none of its references."""
    from anomalyst.data.layouts import load_dataset
    from anomalyst.promises import belonging, require_levels
    from anomalyst.settings import given_decision

    detector = _open(bundle, device)
    detector.decision = given_decision(alpha, alpha_review, detector.decision)
    found = load_dataset(data, layout=layout)
    with progress() as advance:
        used = detector.calibrate(belonging(detector, found, found.train, category), advance)
    require_levels(detector, (alpha, alpha_review), used)
    _keep(detector, bundle, as_json)


@app.command()
def predict(
    bundle: AnyBundle,
    images: Annotated[
        list[str], typer.Argument(help="Images, folders, Parquet lists, or URLs of them.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")],
    category: Annotated[
        str | None, typer.Option(help="The product on all images (default: found by similarity).")
    ] = None,
    alpha: Alpha = None,
    alpha_review: AlphaReview = None,
    maps: Annotated[bool, typer.Option("--maps", help="Write each score map as .npy.")] = False,
    overlays: Annotated[
        bool, typer.Option("--overlays", help="Write each image under its heat map as .png.")
    ] = False,
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Processor threads of the network (default: all).")
    ] = None,
    engine: EngineName = "plain",
    address: Address = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Judge images: predictions.jsonl, one line an image, in input order."""
    from anomalyst.predictions import OutputChoice, write_predictions
    from anomalyst.promises import require_levels
    from anomalyst.scale.predicting import Placement, predict_on_ray
    from anomalyst.scale.sources import list_sources
    from anomalyst.settings import given_decision

    ray = engine == "ray"
    _check_ray(ray, bundle, bool(address or workers))
    detector = _open(bundle, "cpu" if ray else device, threads)
    detector.decision = given_decision(alpha, alpha_review, detector.decision)
    concerned = (category,) if category else detector.categories
    require_levels(detector, (alpha, alpha_review), concerned)
    sources = list_sources(images)
    wanted: Any = {"category": category, "choice": OutputChoice(maps, overlays)}
    if ray:
        placement = Placement(address, workers, device)
        records = predict_on_ray(bundle, detector, sources, output, placement, **wanted)
    else:
        records = write_predictions(detector, sources, output, **wanted)
    counts = _follow(records, len(sources), as_json)
    if not as_json:
        print(output / "predictions.jsonl")
    if counts.get("error"):
        raise typer.Exit(2)


def _check_ray(ray: bool, bundle: Path, described: bool) -> None:
    from anomalyst.runtime.exported import is_meant_as_export

    if not ray and described:
        raise InputError("--address and --workers say how Ray works: add --engine ray")
    if ray and is_meant_as_export(bundle):
        raise InputError(f"{bundle}: is an export; --engine ray takes the bundle behind it")


def _follow(records: Iterable[Mapping[str, object]], total: int, as_json: bool) -> dict[str, int]:
    """Show records as they come, and return how many there are of each verdict."""
    counts: dict[str, int] = {}
    with progress() as advance:
        for done, record in enumerate(records, start=1):
            word = "error" if record["error"] else str(record["verdict"] or "not calibrated")
            counts[word] = counts.get(word, 0) + 1
            if record["error"]:
                say(f"error: {record['error']}")
            if as_json:
                print(json.dumps(record), flush=True)
            advance("predict", done, total)
    say(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return counts


@app.command()
def evaluate(
    bundle: Bundle,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")],
    category: Categories = None,
    layout: Layout = None,
    eval_size: Annotated[
        str, typer.Option(help="Side in pixels at which maps meet masks, or `original`.")
    ] = "256",
    device: Device = "auto",
    feature_cache: CacheFolder = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle on a test set: metrics.json and report.html."""
    from anomalyst.data.layouts import load_dataset
    from anomalyst.detector import Detector
    from anomalyst.evaluation import evaluate as measure
    from anomalyst.evaluation import write_metrics
    from anomalyst.evaluation_report import write_evaluation_report
    from anomalyst.settings import parse_eval_size

    size = parse_eval_size(eval_size)
    make_folder(output)
    detector = Detector.load(bundle, device=device, feature_cache=make_cache(feature_cache))
    found = load_dataset(data, layout=layout, categories=category)
    with progress() as advance:
        result = measure(detector, found, eval_size=size, progress=advance)
    write_metrics(result, output)
    report = write_evaluation_report(result, detector, output, source=bundle, data=found)
    show_json(result.metrics) if as_json else show_metrics(result.metrics)
    say(f"report: {report}")
    for error in result.errors:
        say(f"error: {error}")
    if result.errors:
        raise typer.Exit(2)


app.command()(benchmark)
app.command()(profile)
app.command()(export)
app.command()(serve)
app.command()(pseudo_anomalies)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The .pth of the official INP-Former code.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle: folder or .zip.")],
    image_size: Annotated[int, typer.Option(min=14, help="Crop that it was trained at.")] = 392,
    resize: Annotated[int, typer.Option(min=14, help="Image size before the crop.")] = 448,
    as_json: Json = False,
) -> None:
    """Make a bundle of a checkpoint that a method's authors trained."""
    from anomalyst.bundle import check_destination
    from anomalyst.convert import convert_inp_former

    check_destination(output)
    detector = convert_inp_former(checkpoint, image_size=image_size, resize=resize)
    _keep(detector, output, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what works here: extras, weights, devices, and a self-test in seconds."""
    from anomalyst.doctor import examine

    rows = examine()
    if as_json:
        show_json(rows)
    else:
        show_table(["check", "works", "detail"], [list(row.values()) for row in rows])
    if not all(row["works"] for row in rows if row["check"] in ("runtime", "self-test")):
        raise typer.Exit(2)


def _open(bundle: Path, device: str, threads: int | None = None) -> Any:
    """Return the detector of a bundle, or the runtime of an exported one, which needs no torch."""
    from anomalyst.runtime.exported import is_meant_as_export

    if is_meant_as_export(bundle) or find_spec("torch") is None:
        from anomalyst.runtime import Runtime

        if device not in ("auto", "cpu"):
            raise InputError(f"--device {device}: exported bundles run on the processor; omit it")
        return Runtime.load(bundle, threads=threads)
    from anomalyst.detector import Detector

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return Detector.load(bundle, device=device)


def _version(wanted: bool) -> None:
    if wanted:
        from anomalyst import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: 0 done, 2 the user's input or data is at fault, 1 our fault."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) != len(sys.argv) - 1
    if isinstance(sys.stdout, TextIOWrapper):  # a dash must not stop a console that lacks it
        sys.stdout.reconfigure(errors="replace")
    try:
        code = app(arguments, standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error))
    if code == _STOPPED:
        say("stopped")
    sys.exit(code if isinstance(code, int) else 0)


def _nearest(error: Any) -> str:
    """Return the existing option or command that a mistyped one comes closest to."""
    context, message = getattr(error, "ctx", None), error.format_message()
    if context is None or not message.startswith("No such") or "Did you mean" in message:
        return ""
    known = list(getattr(context.command, "commands", {}))
    known += [name for option in context.command.params for name in option.opts]
    near = get_close_matches(message.split()[-1].strip("'."), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _explain(error: Exception) -> int:
    """Print one line on an error and return the exit code."""
    if type(error).__name__ == "Abort":  # Ctrl-C, as older versions of typer tell it
        say("stopped")
        return _STOPPED
    # typer raises click's errors, or those of a click of its own: what they share is this method.
    if hasattr(error, "format_message"):
        message = error.format_message()
        if message:  # empty where the help was shown instead
            say(f"error: {message}{_nearest(error)}")
        return 2
    if isinstance(error, InputError):
        say(f"error: {error}")
        return 2
    if isinstance(error, ImportError) and error.name and not error.name.startswith("anomalyst"):
        say(f"error: this needs {error.name}; install it with: pip install 'anomalyst[train]'")
        return 2
    say(f"internal error, our fault: {type(error).__name__}: {error} (--debug shows where)")
    return 1


if __name__ == "__main__":
    main()
