"""The runtime: an exported bundle as a judge of images, with the results that its detector gives.

One graph serves all categories; what a category is compared with is fed in beside the images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anomalyst import judging
from anomalyst.calibrating import calibration_of
from anomalyst.data.transforms import Preprocess, Seen
from anomalyst.errors import InputError, unknown
from anomalyst.inference import ImageSource, Item
from anomalyst.retrieval import CategoryIndex
from anomalyst.runtime.engines import HOME, Engine, EngineName, installed, is_older, make_engine
from anomalyst.runtime.enrolment import learn
from anomalyst.runtime.exported import (
    REFERENCES,
    RETRIEVAL,
    Export,
    ExportedCategory,
    read_export,
    read_files,
    tensor_file,
    write_export,
)
from anomalyst.scoring import Calibration, Decision
from anomalyst.types import ByteArray, FloatArray, Prediction, Progress, Sample

_log = logging.getLogger(__name__)


class Runtime:
    """Judges images by an exported bundle, without torch.

    Made by `Runtime.load`. ``decision`` may be set: the false-reject rates for ``ng`` and
    ``review``, the bundle's own at first.
    """

    trains_apart = False  # nobody trains an export

    def __init__(self, export: Export, engine: Engine, decision: Decision | None = None) -> None:
        known = export.manifest
        self.manifest = known
        self.engine = engine
        self.decision = decision or Decision(known.alpha, known.alpha_review)
        self.sigma = known.sigma
        self.needs_category = known.needs_category
        self.needs_name = known.needs_class_name and known.judges_unseen
        self.calibration = {
            name: Calibration.of(
                each.calibration_scores, each.calibration_maxima, each.calibration_sha256
            )
            for name, each in known.categories.items()
            if each.calibration_scores
        }
        self._index = CategoryIndex(export.retrieval)
        self._references = {
            name: {key: export.references[tensor] for key, tensor in each.references.items()}
            for name, each in known.categories.items()
        }
        self._frame = export.frame
        self._recent: str | None = None
        self._origin: Path | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        engine: EngineName = "auto",
        decision: Decision | None = None,
    ) -> Runtime:
        """Read an exported bundle, a folder or a ``.zip``; nothing else, the network least of all.

        Parameters
        ----------
        path
            What ``anomalyst export`` wrote.
        threads
            Processor threads of the network; the engine's own choice by default.
        engine
            ``onnxruntime`` or ``openvino``; ``auto`` is the one that the export was made for and
            checked with.
        decision
            Other false-reject rates than the bundle's.

        Raises
        ------
        InputError
            Not an exported bundle, a file missing or altered, or of a newer schema; the engine is
            missing, or too old for the graph.
        """
        export = read_export(Path(path))
        try:
            made = make_engine(export, engine, threads)
            _require_match(export, made)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error.__cause__
        _warn_of_age(path, export, made)
        runtime = cls(export, made, decision)
        runtime._origin = Path(path)
        return runtime

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories that the bundle held when it was exported."""
        return tuple(self.manifest.categories)

    @property
    def references(self) -> Mapping[str, Sequence[str]]:
        """SHA-256 of each category's normal references."""
        known = self.manifest.categories.items()
        return {name: each.reference_sha256 for name, each in known}

    def counts(self, category: str) -> dict[str, int]:
        """Return how many references a category has: normal and abnormal ones."""
        known = self.manifest.categories[category]
        return {"references": known.n_normal, "abnormal": known.n_abnormal, "masks_found": 0}

    @property
    def descriptors(self) -> Mapping[str, FloatArray]:
        """What tells the category: descriptors ``[n, C]`` of each one's references."""
        return self._index.descriptors

    @cached_property
    def preprocess(self) -> Preprocess:
        """What makes the network's input of an image; refuses what a fixed graph cannot take."""
        made = Preprocess.from_dict(self.manifest.preprocess, self._frame)
        size = self.manifest.size
        return made if size is None else _Fixed(**vars(made), size=size)

    @property
    def judges_any(self) -> bool:
        """Whether images of any category can be judged, as nothing of their own is needed."""
        free = self.manifest.judges_unseen or not self.categories
        return free and not self.needs_category and self.engine.inputs == {"image"}

    def knows(self, category: str) -> bool:
        """Tell whether images of that category can be judged."""
        return category in self.manifest.categories or self.judges_any

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        category: str | None = None,
        batch_size: int = 8,
        keep_pixels: bool = False,
    ) -> Iterator[Prediction]:
        """Yield one prediction an image, lazily and in order, as `Detector.predict` does.

        A bad image yields a prediction with ``error`` set; the others are still done.

        Parameters
        ----------
        images
            One image or an iterable of them, which may never end: paths, samples, bytes, uint8
            arrays. Two threads read ahead.
        category
            Of all images; else each sample's own; else the only one there is; else the category
            of the most similar reference.
        batch_size
            Images of one shape that go through the network together.
        keep_pixels
            Keep the decoded image on the prediction.
        """
        return judging.predict(self, images, category, batch_size, keep_pixels)

    # ---- learning at the line -------------------------------------------------------------------

    def enroll(
        self,
        category: str,
        normal: Sequence[ImageSource],
        progress: Progress | None = None,
    ) -> None:
        """Add normal references of one category, as `Detector.enroll` does; `save` keeps them.

        Only exports of methods that compare with all their references as they are can do so. The
        category's calibration ends with it.

        Parameters
        ----------
        category
            A new or a known category.
        normal
            Paths, samples, bytes or uint8 arrays; known ones are passed over.
        progress
            Called with the stage, what is done and what there is to do.

        Raises
        ------
        InputError
            The method's references are more than that, or an image is bad. The runtime stays as it
            was.
        """
        learned = learn(self, category, normal, progress)
        fresh = {name: np.concatenate(rows) for name, rows in learned.rows.items()}
        known = self._references.get(category, {})
        self._references[category] = {
            name: np.concatenate([known[name], rows]) if name in known else rows
            for name, rows in fresh.items()
        }
        self._index.remember(category, np.concatenate(learned.descriptors))
        self.calibration.pop(category, None)
        default = ExportedCategory(heat_unit=self.manifest.heat_unit)
        record = self.manifest.categories.setdefault(category, default)
        record.reference_sha256 = [*record.reference_sha256, *learned.sha256]
        record.n_normal += len(learned.sha256)

    def calibrate(self, data: Sequence[Sample], progress: Progress | None = None) -> dict[str, int]:
        """Calibrate from held-out normal images, as `Detector.calibrate` does; `save` keeps it.

        Returns
        -------
        dict
            Number of images used, by category.

        Raises
        ------
        InputError
            An image is bad or anomalous, of no known category, or nothing is left.
        """
        seen = (digest for known in self.references.values() for digest in known)
        found = calibration_of(self.predict, data, seen, {}, progress)
        self.calibration |= found
        return {name: known.count for name, known in found.items()}

    def save(self, path: str | Path) -> Path:
        """Write the export with all that was learned since, a folder or a ``.zip``.

        Raises
        ------
        InputError
            The export that it was loaded from has changed meanwhile, or the place is no good.
        """
        target = Path(path)
        assert self._origin is not None
        written, files = read_files(self._origin)
        if written.sha256 != self.manifest.sha256:
            raise InputError(f"{self._origin}: was changed after it was loaded; load it again")
        record = self.manifest
        tensors: dict[str, npt.NDArray[Any]] = {}
        places: dict[int, str] = {}  # what several categories share is kept once
        for number, (name, references) in enumerate(self._references.items()):
            for key, array in references.items():
                place = places.setdefault(id(array), f"{key}/{number}")
                record.categories[name].references[key] = place
                tensors[place] = array
        for name, each in record.categories.items():
            calibration = self.calibration.get(name, Calibration((), ()))
            each.calibration_scores = list(calibration.scores)
            each.calibration_maxima = list(calibration.maxima)
            each.calibration_sha256 = list(calibration.images)
        record.alpha, record.alpha_review = self.decision.alpha, self.decision.alpha_review
        parts = {REFERENCES: tensors, RETRIEVAL: dict(self.descriptors)}
        files |= {name: tensor_file(arrays) for name, arrays in parts.items() if arrays}
        write_export(target, record, files)
        self._origin = target
        return target

    def heat_unit(self, category: str | None) -> float:
        """Return the map value at which a heat map turns strong: the pixel threshold, if any."""
        threshold = judging.heat_threshold(self.calibration, self.decision, category)
        known = self.manifest.categories.get(category or "")
        return threshold or (self.manifest.heat_unit if known is None else known.heat_unit)

    # ---- what `judging` asks --------------------------------------------------------------------

    def compare(self, descriptors: FloatArray) -> Sequence[Mapping[str, float]]:
        """Return each image's cosine to every category's nearest reference."""
        return self._index.compare(descriptors)

    def look(self, items: Sequence[Item], likely: str | None) -> judging.Glance:
        """Take good items of one shape; the graph runs once something is asked of them."""
        images = np.stack([item.tensor for item in items if item.tensor is not None])
        guess = next((n for n in (likely, self._recent) if n in self._references), None)
        return _GraphGlance(self, images, guess or next(iter(self._references), None))

    def look_through(self, images: FloatArray) -> dict[str, npt.NDArray[Any]]:
        """Return all that the graph gives of images ``[B, 3, h, w]``, as some category."""
        return self._run(images, next(iter(self._references), None))

    def _run(self, images: FloatArray, category: str | None) -> dict[str, npt.NDArray[Any]]:
        references = self._references.get(category or "", {})
        return self.engine.run({"image": images, **references})

    def _require(self, category: str | None) -> None:
        """Raise where the graph cannot judge as that category."""
        if category is None and self.needs_name:
            raise InputError(
                f"{self.manifest.method} needs a class name: say which product it is "
                "(--category NAME)"
            )
        if self.engine.inputs != {"image"} and category not in self._references:
            raise unknown("category", category or "", self.categories)


class _GraphGlance:
    """A batch before the graph: it runs with the likeliest references, and again for the others."""

    def __init__(self, runtime: Runtime, images: FloatArray, guess: str | None) -> None:
        self._runtime = runtime
        self._images = images
        self._guess = guess

    @cached_property
    def _whole(self) -> dict[str, npt.NDArray[Any]]:
        """What the graph says of all images as the guessed category."""
        return self._runtime._run(self._images, self._guess)

    def descriptors(self) -> FloatArray:
        if not self._runtime._index:
            return np.zeros((len(self._images), 0), dtype=np.float32)
        found: FloatArray = self._whole["descriptor"]
        return found

    def score(self, at: Sequence[int], category: str | None) -> tuple[FloatArray, Sequence[float]]:
        self._runtime._require(category)
        self._runtime._recent = category
        one_for_all = self._runtime.engine.inputs == {"image"}
        ran = "_whole" in vars(self)
        if (ran or len(at) == len(self._images)) and (one_for_all or category == self._guess):
            maps, scores = (self._whole[name][list(at)] for name in ("map", "score"))
        else:
            found = self._runtime._run(self._images[list(at)], category)
            maps, scores = found["map"], found["score"]
        return maps, scores.tolist()


@dataclass(frozen=True)
class _Fixed(Preprocess):
    """Preprocessing for a graph that takes images of one ``size`` (height, width) only."""

    size: tuple[int, int] = (0, 0)

    def see(self, image: ByteArray) -> Seen:
        sizes = self.input_sizes(*image.shape[:2])
        height, width = next((size for size in sizes if size != self.size), self.size)
        if (height, width) != self.size:
            raise InputError(
                f"an image of {image.shape[1]}x{image.shape[0]} pixels goes into the network as "
                f"{width}x{height}, and this export takes {self.size[1]}x{self.size[0]} only: "
                "give images of that shape, or export the bundle again for others (--size)"
            )
        return super().see(image)


def _require_match(export: Export, engine: Engine) -> None:
    """Raise where graph and manifest do not belong together."""
    fed = {frozenset(each.references) for each in export.manifest.categories.values()}
    needed = {"map", "score"} | ({"descriptor"} if export.retrieval else set())
    wrong = [*(sorted(each) for each in fed if each | {"image"} != engine.inputs)]
    if wrong or not needed <= engine.outputs:
        raise InputError(
            f"the graph takes {', '.join(sorted(engine.inputs))} and gives "
            f"{', '.join(sorted(engine.outputs))}, which is not what the manifest says; "
            "export the bundle again"
        )


def _warn_of_age(path: str | Path, export: Export, engine: Engine) -> None:
    """Warn where the export was checked with a newer engine than the one that runs it."""
    here = installed(engine.name) or ""
    made = export.manifest.versions.get(engine.name)
    if made and engine.name == HOME[export.manifest.format] and is_older(here, made):
        _log.warning(
            "%s: checked with %s %s when it was exported, and this is %s: "
            "pip install -U %s, or export the bundle again here",
            path,
            engine.name,
            made,
            here,
            engine.name,
        )
