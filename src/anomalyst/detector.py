"""Detector: a frozen backbone, one method, its references by category, and a calibration."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalyst.bundle import Manifest, ReferenceRecord
from anomalyst.data.layouts import Dataset, few_shot, hold_out
from anomalyst.data.transforms import Preprocess
from anomalyst.errors import InputError, unknown
from anomalyst.features.backbones import find_backbone
from anomalyst.inference import ImageSource, by_shape, read_batches, source_hash
from anomalyst.methods.base import Method, find_method, make_options
from anomalyst.scoring import Calibration, Decision, normals_needed
from anomalyst.types import Prediction, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from anomalyst.engine import Engine
    from anomalyst.features.cache import FeatureCache
    from anomalyst.retrieval import CategoryIndex

_ONE_IMAGE = (str, Path, bytes, Sample, np.ndarray)


class Detector:
    """Finds what differs from the references of a category.

    Parameters
    ----------
    method
        A registered name, see `anomalyst.methods`.
    backbone
        A backbone id, see `anomalyst.backbones`; ``auto`` takes DINOv2-small from the local hub
        cache, else the packaged one.
    weights
        ``file:PATH`` to take the backbone's weights from a file.
    image_size
        Short side in pixels at which the network sees an image; the backbone's own by default.
    square
        Resize both sides alike instead of keeping the proportions, as some papers do.
    resize
        Resize the short side to this first, then crop ``image_size`` squared from the middle, as
        some papers do.
    layers
        Layers to tap; the method's choice by default.
    options
        The method's own options.
    decision
        False-reject rates for ``ng`` and ``review``.
    seed
        Fixes every random choice.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    offline
        Forbid downloads.
    feature_cache
        Keeps frozen features on disk, in half precision; worth it when images come back.

    Raises
    ------
    InputError
        From `fit` and the other stages: anything wrong with names, options or images.
    """

    def __init__(
        self,
        method: str,
        *,
        backbone: str = "auto",
        weights: str | None = None,
        image_size: int | None = None,
        square: bool = False,
        resize: int | None = None,
        layers: Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,
        decision: Decision | None = None,
        seed: int = 0,
        device: str = "auto",
        offline: bool = False,
        feature_cache: FeatureCache | None = None,
    ) -> None:
        self.spec = find_method(method)
        self.backbone_id = backbone
        self.weights = weights
        self.image_size = image_size
        self.square = square
        self.resize = resize
        self.layers = layers
        self.options = dict(options or {})
        self.decision = decision or Decision()
        self.seed = seed
        self.device = device
        self.offline = offline
        self.feature_cache = feature_cache
        self.setting = "single"
        self.shots: int | None = None
        self.references: dict[str, list[ReferenceRecord]] = {}
        self.calibration: dict[str, Calibration] = {}
        self.seconds: dict[str, float] = {}
        self._parts: tuple[Engine, Method, CategoryIndex] | None = None

    # ---- the parts, made when first needed ------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """Preprocessing and frozen backbone."""
        return self._made()[0]

    @property
    def method(self) -> Method:
        """The method with all that it has learned."""
        return self._made()[1]

    @property
    def index(self) -> CategoryIndex:
        """Descriptors of the references, which tell a category from an image alone."""
        return self._made()[2]

    @property
    def categories(self) -> tuple[str, ...]:
        """The enrolled categories."""
        return tuple(self.references)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content hashes of all references, whatever their order."""
        hashes = sorted(r.sha256 for records in self.references.values() for r in records)
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def describe(self) -> list[str]:
        """Return one line a category: its references and what its calibration can promise."""
        lines = []
        for name, references in self.references.items():
            calibration = self.calibration.get(name)
            alpha = self.decision.alpha
            if calibration is None:
                state = "not calibrated: scores, but no verdicts"
            elif calibration.supports(alpha):
                state = f"calibrated on {calibration.count}: at most {alpha:.2%} of good parts NG"
            else:
                state = (
                    f"calibrated on {calibration.count}: NG at {alpha:g} needs "
                    f"{normals_needed(alpha)}, the least here is "
                    f"--alpha {1 / (calibration.count + 1):.3f}"
                )
            lines.append(f"{name}: {len(references)} references, {state}")
        return lines

    def match_categories(self, data: Dataset, wanted: Sequence[str] | None) -> list[Sample]:
        """Return a data set's normal training images that belong to this detector's categories.

        A data set of one category stands for the only one enrolled, or for the one in ``wanted``,
        whatever its folder is called.
        """
        names = list(wanted or self.categories)
        for name in names:
            if name not in self.references:
                raise unknown("category", name, self.references)
        if len(data.categories) == 1 and len(names) == 1:
            return [replace(sample, category=names[0]) for sample in data.train]
        found = [sample for sample in data.train if sample.category in names]
        if not found:
            raise InputError(
                f"{data.root}: no good images of {', '.join(names)}; "
                f"it has {', '.join(data.categories)}"
            )
        return found

    def _made(self) -> tuple[Engine, Method, CategoryIndex]:
        """Return the parts; loading the backbone is the first slow thing that happens."""
        if self._parts is None:
            method, spec = self.spec.load(), find_backbone(self.backbone_id)
            options = make_options(method, self.options)
            layers = tuple(self.layers) if self.layers else method.default_layers(spec)
            preprocess = Preprocess(
                image_size=self.image_size or spec.image_size,
                multiple=spec.stride,
                mean=spec.mean,
                std=spec.std,
                square=self.square,
                resize=self.resize,
            )
            learner = method(options, spec, layers, self.seed)

            from anomalyst.engine import Engine, pick_device
            from anomalyst.features.extractor import Backbone
            from anomalyst.retrieval import CategoryIndex

            device = pick_device(self.device)
            backbone = Backbone.load(
                spec.id, layers, weights=self.weights, offline=self.offline, device=device
            )
            engine = Engine(backbone, preprocess, device, self.feature_cache)
            self._parts = (engine, learner, CategoryIndex())
        return self._parts

    def restore(
        self, engine: Engine, method: Method, descriptors: Mapping[str, Tensor], manifest: Manifest
    ) -> None:
        """Take over everything that a bundle holds."""
        from anomalyst.retrieval import CategoryIndex

        index = CategoryIndex()
        index.load(descriptors)
        self._parts = (engine, method, index)
        self.setting, self.shots = manifest.setting, manifest.shots
        self.seconds = manifest.seconds
        for name, record in manifest.categories.items():
            self.references[name] = record.references
            if record.calibration_scores:
                self.calibration[name] = Calibration.of(
                    record.calibration_scores, record.calibration_maxima
                )

    # ---- learning -------------------------------------------------------------------------------

    def fit(
        self, data: Sequence[Sample], *, shots: int | None = None, calibration: float = 0.2
    ) -> Detector:
        """Run the stages that the method has, on normal training images of any categories.

        Parameters
        ----------
        data
            Samples with a category each, such as ``load_dataset(...).train``.
        shots
            Keep only so many references a category, drawn by ``seed``; all by default.
        calibration
            Share of each category's normal images, the last by name, that is held out from the
            references and calibrates the scores; 0 leaves the detector uncalibrated.
        """
        self._check_normal(data)
        kept, held_out = hold_out(data, calibration)
        if shots is not None:
            kept = few_shot(kept, shots, self.seed)
        self.shots, self.setting = shots, "few-shot" if shots is not None else "single"
        self.references, self.calibration = {}, {}
        self._parts = None
        _ = self.engine  # loading weights is no part of the time that enrolment takes
        began = time.perf_counter()
        for category in dict.fromkeys(_category(sample) for sample in kept):
            self.enroll(category, [s for s in kept if s.category == category])
        self.seconds = {"train": 0.0, "enroll": time.perf_counter() - began}
        if held_out:
            self.calibrate(held_out)
        return self

    def _check_normal(self, data: Sequence[Sample]) -> None:
        if not data:
            raise InputError("no training images: the data set has no train/good images")
        for sample in data:
            if sample.label == 1 and not self.spec.abnormal_references:
                raise InputError(
                    f"{sample.path}: {self.spec.name} learns from normal images only; "
                    "leave anomalous ones out (methods with abnormal references: "
                    "see `anomalyst methods`)"
                )

    def enroll(
        self,
        category: str,
        normal: Sequence[ImageSource] = (),
        abnormal: Sequence[tuple[ImageSource, ImageSource | None]] = (),
    ) -> None:
        """Add references of one category: seconds, no gradient.

        Parameters
        ----------
        category
            A new or an enrolled category.
        normal
            Normal images: paths, samples, bytes or uint8 arrays.
        abnormal
            Pairs of an abnormal image and its mask, for methods that use them.
        """
        if abnormal and not self.spec.abnormal_references:
            raise InputError(
                f"{self.spec.name} cannot use abnormal references; "
                "`anomalyst methods` shows which methods can"
            )
        if not normal:
            raise InputError(f"category {category!r}: give at least one normal reference image")
        views: list[Sequence[Tensor]] = []
        plain: list[Sequence[Tensor]] = []
        for batch in read_batches(normal, self.engine.preprocess, 8):
            for item in batch:
                if item.error:
                    raise InputError(f"reference of {category!r}: {item.error}")
            for positions in by_shape(batch):
                found = self.engine.view_features(
                    [batch[p] for p in positions],
                    self.method.reference_views,
                    self.method.view_description,
                )
                plain.append(found[0])
                views.extend(found)
        self.method.enroll(category, views)
        for features in plain:
            self.index.add(category, features)
        records = self.references.setdefault(category, [])
        records.extend(_record(source, number) for number, source in enumerate(normal))
        # What calibrated the old references says nothing of the new ones.
        self.calibration.pop(category, None)

    def calibrate(self, data: Sequence[Sample]) -> dict[str, int]:
        """Calibrate from held-out normal images; references among them are left out.

        Returns
        -------
        dict
            Number of images used, by category. Replaces those categories' earlier calibration.

        Raises
        ------
        InputError
            A category was not enrolled, an image is bad or anomalous, or nothing is left.
        """
        anomalous = next((s for s in data if s.label == 1), None)
        if anomalous is not None:
            raise InputError(f"{anomalous.path}: calibration takes normal images only")
        used = {r.sha256 for records in self.references.values() for r in records}
        fresh = [sample for sample in data if source_hash(sample) not in used]
        if not fresh:
            raise InputError(
                f"all {len(data)} images given are references of this detector: "
                "calibrate with normal images that it has not seen"
            )
        scores: dict[str, list[float]] = {}
        maxima: dict[str, list[float]] = {}
        for p in self.predict(fresh):
            if p.error or p.category is None or p.score is None or p.map is None:
                raise InputError(f"calibration image: {p.error}")
            scores.setdefault(p.category, []).append(p.score)
            maxima.setdefault(p.category, []).append(float(p.map.max()))
        for category, values in scores.items():
            self.calibration[category] = Calibration.of(values, maxima[category])
        return {category: len(values) for category, values in scores.items()}

    # ---- prediction -----------------------------------------------------------------------------

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        category: str | None = None,
        batch_size: int = 8,
        keep_pixels: bool = False,
    ) -> Iterator[Prediction]:
        """Yield one prediction an image, lazily and in order, for any number of images.

        A bad image yields a prediction with ``error`` set; the others are still done.

        Parameters
        ----------
        images
            One image or an iterable of them: paths, samples, bytes, uint8 arrays.
        category
            Of all images; else each sample's own; else the only one enrolled; else the category
            of the most similar reference.
        batch_size
            Images of one shape that go through the network together.
        keep_pixels
            Keep the decoded image on the prediction.
        """
        if not self.categories:
            raise InputError("this detector has no references yet: fit or enroll first")
        if category is not None and category not in self.references:
            raise unknown("category", category, self.references)
        from anomalyst.judging import judge_all

        sources = [images] if isinstance(images, _ONE_IMAGE) else images
        return judge_all(self, sources, category, batch_size, keep_pixels)

    def heat_unit(self, category: str) -> float:
        """Return the map value at which a heat map turns strong: the pixel threshold, if any."""
        calibration = self.calibration.get(category)
        threshold = calibration.pixel_threshold(self.decision) if calibration else None
        # A threshold of 0 (held-out images equal to the references) is no unit to draw in.
        return threshold if threshold else self.method.heat_unit(category)

    def require_level(self, alpha: float) -> None:
        """Raise unless every category is calibrated well enough to promise ``alpha``."""
        for category in self.categories:
            count = self.calibration[category].count if category in self.calibration else 0
            if count < normals_needed(alpha):
                raise InputError(
                    f"category {category!r}: alpha {alpha:g} needs at least "
                    f"{normals_needed(alpha)} held-out normal images, it has {count}; give more "
                    "with `anomalyst calibrate BUNDLE DATA` or ask for a larger alpha"
                )

    # ---- files ----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the whole detector, backbone weights included, as a folder or a ``.zip``.

        Raises
        ------
        InputError
            There is nothing to save yet, or the place cannot be written.
        """
        from anomalyst.persistence import save_detector

        if not self.categories:
            raise InputError("this detector has no references yet: fit or enroll before saving")
        save_detector(self, Path(path))
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        decision: Decision | None = None,
        feature_cache: FeatureCache | None = None,
    ) -> Detector:
        """Read a bundle; nothing else is read, the network least of all.

        Raises
        ------
        InputError
            Not a bundle, altered, or of a newer schema.
        """
        from anomalyst.persistence import load_detector

        return load_detector(Path(path), device, decision, feature_cache)


def _record(source: ImageSource, number: int) -> ReferenceRecord:
    place = source.path if isinstance(source, Sample) else source
    name = Path(place).name if isinstance(place, (str, Path)) else f"image-{number}"
    return ReferenceRecord(name=name, sha256=source_hash(source))


def _category(sample: Sample) -> str:
    if sample.category is None:
        raise InputError(f"{sample.path}: no category; give each training image one")
    return sample.category
