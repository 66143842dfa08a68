"""What judging by an exported bundle costs here, stage by stage, on a made-up picture. No torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomalyst import judging
from anomalyst.bundle import now, package_versions
from anomalyst.data.images import MAX_PIXELS, read_image
from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError
from anomalyst.inference import Item, network_inputs, read_item
from anomalyst.predictions import overlay_png
from anomalyst.profiling_clock import Work, time_in_turn
from anomalyst.profiling_record import ColdStart, Drawing, RuntimeProfile, RuntimeTimes, Spread
from anomalyst.runtime.engines import Array, Engine, EngineName, installed
from anomalyst.runtime.exported import Export, read_export
from anomalyst.runtime.judge import Runtime
from anomalyst.scoring import find_regions
from anomalyst.types import ByteArray, Prediction, Progress

PICTURE = (1600, 1200)
_QUALITY = 90  # of the JPEG
_COARSE = (5, 5)  # colours, between which the picture runs smoothly
_NOISE = 3.0  # grey levels: about what a camera adds, and what a JPEG's size comes of
_STARTS = 3
_STANDS_OUT = 0.01  # of the pixels, where regions are looked for
_CALM = -1e6  # a score under every threshold


def profile_runtime(
    path: str | Path,
    *,
    engine: EngineName = "auto",
    threads: Sequence[int] = (),
    batch_sizes: Sequence[int] = (1, 8),
    picture: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> RuntimeProfile:
    """Measure what an exported bundle costs on this machine. Needs no images.

    Parameters
    ----------
    path
        An exported bundle, a folder or a ``.zip``.
    engine
        As of `Runtime.load`.
    threads
        Of the network, measured in turn; by default the engine's own choice alone.
    batch_sizes
        Pictures that are judged together.
    picture
        Width and height of the made-up picture; by default 1600 and 1200, or what the export takes.
    progress
        Called with the stage, what is done and what there is to do.

    Raises
    ------
    InputError
        What `Runtime.load` raises, a number under 1, or a picture that the export cannot take.
    """
    batches = sorted(set(batch_sizes))
    if min(batches, default=0) < 1:
        raise InputError(f"batch size {min(batches, default=0)}: give 1 or more")
    chosen: list[int | None] = [*sorted(set(threads))] or [None]
    runtimes = [Runtime.load(path, engine=engine, threads=count) for count in chosen]
    tell, steps = progress or _silent, len(batches) + 2
    shown = _Shown.make(runtimes[0], picture)
    cold = _start_cold(Path(path), engine, chosen[0], batches, shown)
    tell("profile", 1, steps)
    export, times = read_export(Path(path)), list[RuntimeTimes]()
    with judging.unwarned():
        for done, batch in enumerate(batches, start=2):
            stages = [_Stages(export, runtime, shown, batch) for runtime in runtimes]
            times += _measured(stages, chosen)
            tell("profile", done, steps)
        drawing = _draw(runtimes[0], shown)
    tell("profile", steps, steps)
    known, name = export.manifest, runtimes[0].engine.name
    return RuntimeProfile(
        export=str(path),
        method=known.method,
        format=known.format,
        int8=known.int8,
        engine=name,
        category=shown.category,
        calibrated=shown.category in runtimes[0].calibration,
        picture=shown.size,
        picture_bytes=len(shown.jpeg),
        network_inputs=shown.network_inputs,
        times=tuple(times),
        drawing=drawing,
        cold=cold,
        environment=_environment(name),
    )


def _silent(stage: str, done: int, total: int, note: str = "") -> None:
    return


def _environment(engine: str) -> dict[str, Any]:
    return {
        "date": now(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        engine: installed(engine),
        **package_versions(),
    }


# ---- what is judged -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    """The made-up picture, as a file and as pixels, and the category that it is judged as."""

    jpeg: bytes
    pixels: ByteArray
    item: Item
    category: str | None
    network_inputs: tuple[tuple[int, int, int], ...]

    @classmethod
    def make(cls, runtime: Runtime, size: tuple[int, int] | None) -> _Shown:
        preprocess = runtime.preprocess
        width, height = size or _usual_size(preprocess, runtime.manifest.size)
        # Of a picture as it comes from the file: JPEG changes pixels.
        jpeg = _as_jpeg(_drawn(preprocess, width, height))
        item = read_item(jpeg, "picture", preprocess)
        if item.error is not None or item.tensor is None:
            raise InputError(
                f"the made-up picture of {width}x{height} pixels cannot be judged "
                f"({item.error}): give another size (--picture WIDTHxHEIGHT)"
            )
        known: list[str | None] = [*runtime.calibration, *runtime.categories, None]
        shapes = [
            (len(parts), *part.tensor.shape[1:])
            for _, parts in network_inputs(item, preprocess)
            if (part := parts[0]).tensor is not None
        ]
        return cls(jpeg, read_image(jpeg), item, known[0], tuple(shapes))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]


def _usual_size(preprocess: Preprocess, fixed: tuple[int, int] | None) -> tuple[int, int]:
    """Return width and height of a picture that fits: of the shape that an export asks for."""
    frame, shape = preprocess.frame, None
    if frame is not None and frame.ignore is not None:
        return frame.ignore.shape[1], frame.ignore.shape[0]
    if fixed is not None and (frame is None or frame.crop is None):
        shape = fixed
    if shape is None or preprocess.square or preprocess.resize:
        return PICTURE
    scale = min(PICTURE) / min(shape)
    return round(shape[1] * scale), round(shape[0] * scale)


def _drawn(preprocess: Preprocess, width: int, height: int) -> ByteArray:
    """Return a smooth, noisy picture; where parts are aligned, with what they are found by."""
    if width * height > MAX_PIXELS:
        raise InputError(
            f"a picture of {width}x{height} is over {MAX_PIXELS // 1_000_000} megapixels, and no "
            "larger one is read: give a smaller one (--picture)"
        )
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(60, 200, (*_COARSE, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    noise = random.standard_normal(smooth.shape, dtype=np.float32)
    pixels: ByteArray = (smooth + _NOISE * noise).clip(0, 255).astype(np.uint8)
    frame = preprocess.frame
    if frame is not None and frame.template is not None:
        (x, y), patch = frame.place, frame.template
        below, right = min(y + patch.shape[0], height), min(x + patch.shape[1], width)
        pixels[y:below, x:right] = patch[: max(below - y, 0), : max(right - x, 0), None]
    return pixels


def _as_jpeg(pixels: ByteArray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


# ---- stages -------------------------------------------------------------------------------------


class _Recorder:
    """An engine that keeps what it was fed with and what came out."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self.calls: list[tuple[Mapping[str, Array], dict[str, Array]]] = []
        self._engine = engine

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = self._engine.run(feeds)
        self.calls.append((feeds, found))
        return found


class _Replay:
    """An engine that gives at once what another gave, with maps in which nothing stands out."""

    def __init__(self, recorder: _Recorder) -> None:
        self.name, self.inputs, self.outputs = recorder.name, recorder.inputs, recorder.outputs
        self._found = cycle(
            [{**found, "map": np.full_like(found["map"], _CALM)} for _, found in recorder.calls]
        )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return next(self._found)


class _Stages:
    """The way from files to predictions in parts, of one batch and one runtime."""

    def __init__(self, export: Export, runtime: Runtime, shown: _Shown, batch: int) -> None:
        self.batch = batch
        self._shown, self._runtime = shown, runtime
        recorder = _Recorder(runtime.engine)
        self._judge(Runtime(export, recorder, runtime.decision))
        self._feeds = [feeds for feeds, _ in recorder.calls]
        self._calm = Runtime(export, _Replay(recorder), runtime.decision)

    def works(self) -> dict[str, Work]:
        """Return what is timed, by the names of `RuntimeTimes`; all of a whole batch."""
        shown = self._shown
        return {
            "decode": self._decode,
            "preprocess": self._preprocess,
            "graph": self._run,
            "judging": partial(self._judge, self._calm),
            "from_file": partial(self._predict, shown.jpeg),
            "from_pixels": partial(self._predict, shown.pixels),
        }

    def _decode(self) -> None:
        for _ in range(self.batch):
            read_image(self._shown.jpeg)
            hashlib.sha256(self._shown.jpeg).hexdigest()

    def _preprocess(self) -> None:
        for _ in range(self.batch):
            self._runtime.preprocess.see(self._shown.pixels)

    def _run(self) -> None:
        for feeds in self._feeds:
            self._runtime.engine.run(feeds)

    def _judge(self, runtime: Runtime) -> None:
        """Judge the batch as `Runtime.predict` does once it is read."""
        items = [self._shown.item] * self.batch
        together = 1 if runtime.preprocess.tiling is not None else self.batch
        for first in range(0, self.batch, together):
            some = items[first : first + together]
            judging.judge_batch(runtime, some, self._shown.category, set())

    def _predict(self, image: bytes | ByteArray) -> None:
        images: list[bytes | ByteArray] = [image] * self.batch
        category = self._shown.category
        for _ in self._runtime.predict(images, category=category, batch_size=self.batch):
            pass


def _measured(stages: Sequence[_Stages], threads: Sequence[int | None]) -> list[RuntimeTimes]:
    """Return the times of an image, all stages of all numbers of threads in turn."""
    works = [each.works() for each in stages]
    taken = iter(time_in_turn([work for named in works for work in named.values()]))
    found = []
    for each, named, count in zip(stages, works, threads, strict=True):
        spreads = {name: Spread.of([t / each.batch for t in next(taken)]) for name in named}
        found.append(RuntimeTimes(batch_size=each.batch, threads=count, **spreads))
    return found


def _draw(runtime: Runtime, shown: _Shown) -> Drawing:
    """Time what only defective or inspected pictures need, one at a time."""
    (found,) = runtime.predict(shown.pixels, category=shown.category, keep_pixels=True)
    named = replace(found, category=shown.category or "picture")
    full = _map(named)
    threshold = float(np.quantile(full, 1 - _STANDS_OUT))
    works: list[Work] = [
        partial(_map, named),
        partial(find_regions, full, threshold),
        partial(overlay_png, runtime, named),  # of a prediction that keeps its map
    ]
    assert named.map is not None
    return Drawing(*(Spread.of(times) for times in time_in_turn(works)))


def _map(found: Prediction) -> Array:
    assert found.score_map is not None
    return found.score_map.at(*found.score_map.size)


# ---- cold ---------------------------------------------------------------------------------------


def _start_cold(
    path: Path, engine: str, threads: int | None, batches: Sequence[int], shown: _Shown
) -> ColdStart:
    """Start processes of their own that load the export and judge, one after the other."""
    with tempfile.TemporaryDirectory(prefix="anomalyst-") as folder:
        image = Path(folder) / "picture.jpg"
        image.write_bytes(shown.jpeg)
        request = {
            "export": str(path.absolute()),
            "engine": engine,
            "threads": threads,
            "image": str(image),
            "category": shown.category,
            "batch_sizes": list(batches),
        }
        starts = [_start(request) for _ in range(_STARTS)]
    memory = dict(zip(batches, starts[0]["memory"], strict=True))
    return ColdStart(
        started=Spread.of([each["started"] for each in starts]),
        loaded=Spread.of([each["loaded"] for each in starts]),
        memory_mb=memory,
    )


def _start(request: Mapping[str, Any]) -> dict[str, Any]:
    words = json.dumps({**request, "started": time.time()})
    command = [sys.executable, "-m", "anomalyst.runtime.cold", words]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise InputError(
            f"{request['export']}: a fresh process cannot judge by it "
            f"({(ended.stderr.strip().splitlines() or ['killed'])[-1]})"
        )
    found: dict[str, Any] = json.loads(ended.stdout)
    return found
