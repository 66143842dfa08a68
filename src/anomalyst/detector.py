"""Detector: a frozen backbone, one method, its references by category, and a calibration."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalyst import judging
from anomalyst.bundle import AbnormalRecord, ReferenceRecord
from anomalyst.calibrating import calibration_of
from anomalyst.data.layouts import few_shot, hold_out
from anomalyst.enrolment import AbnormalSource, category_of, require_learnable
from anomalyst.errors import InputError
from anomalyst.inference import ImageSource
from anomalyst.methods.base import Method, find_method, make_options
from anomalyst.scoring import Calibration, Decision
from anomalyst.tiling import OVERLAP
from anomalyst.torch_judge import TorchJudge
from anomalyst.training_setup import TrainingSetup
from anomalyst.types import Prediction, Progress, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from anomalyst.data.frame import Frame
    from anomalyst.engine import Engine
    from anomalyst.features.cache import FeatureCache
    from anomalyst.retrieval import CategoryIndex


class Detector:
    """Finds what differs from the references of a category.

    Parameters
    ----------
    method
        A registered name, see `anomalyst.methods`.
    backbone
        A backbone id, see `anomalyst.backbones`; ``auto`` is the method's own, or DINOv2-small.
    weights
        ``file:PATH`` to take the backbone's weights from a file.
    image_size
        Short side in pixels at which the network sees an image; the backbone's own by default.
    square
        Resize both sides alike instead of keeping the proportions, as some papers do.
    resize
        Resize the short side to this first, then crop ``image_size`` squared from the middle, as
        some papers do.
    frame
        Region of interest, ignore mask and alignment, see `Frame.read`; all of an image by default.
    tile, overlap, overview
        Look at images in overlapping tiles of this side, ``image_size`` being the short side of
        the whole, see `Tiling`; as a whole by default.
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
        frame: Frame | None = None,
        tile: int | None = None,
        overlap: float = OVERLAP,
        overview: bool = False,
        layers: Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,
        decision: Decision | None = None,
        seed: int = 0,
        device: str = "auto",
        offline: bool = False,
        feature_cache: FeatureCache | None = None,
    ) -> None:
        self.spec = find_method(method)
        self.backbone_id = self.spec.backbone_for(backbone)
        self.weights = weights
        self.image_size = image_size
        self.square = square
        self.resize = resize
        self.frame = frame
        self.tile = tile
        self.overlap = overlap
        self.overview = overview
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
        self.abnormal: dict[str, list[AbnormalRecord]] = {}
        self.trained_on: list[ReferenceRecord] = []
        self.calibration: dict[str, Calibration] = {}
        self.seconds: dict[str, float] = {}
        self._engine: Engine | None = None
        self._learner: tuple[Method, CategoryIndex] | None = None

    # ---- the parts, made when first needed ------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """Preprocessing and frozen backbone; loading it is the first slow thing that happens."""
        if self._engine is None:
            from anomalyst.assembly import make_engine

            self._engine = make_engine(self)
        return self._engine

    @property
    def method(self) -> Method:
        """The method with all that it has learned."""
        return self._learned()[0]

    @property
    def index(self) -> CategoryIndex:
        """Descriptors of the references, which tell a category from an image alone."""
        return self._learned()[1]

    @property
    def categories(self) -> tuple[str, ...]:
        """The enrolled categories."""
        return tuple(self.references)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content hashes of all images behind the detector, sorted."""
        return hashlib.sha256("".join(sorted(self.image_hashes)).encode()).hexdigest()

    @property
    def image_hashes(self) -> list[str]:
        """SHA-256 of every image that the detector was made or calibrated on."""
        known: list[Sequence[ReferenceRecord]] = [*self.references.values(), self.trained_on]
        hashes = [r.sha256 for records in (*known, *self.abnormal.values()) for r in records]
        return hashes + [image for each in self.calibration.values() for image in each.images]

    def _learned(self) -> tuple[Method, CategoryIndex]:
        if self._learner is None:
            from anomalyst.retrieval import CategoryIndex

            method, backbone = self.spec.load(), self.engine.backbone
            chosen = (make_options(method, self.options), backbone.spec, backbone.layers)
            learner = method(*chosen, self.seed)
            learner.bind(backbone.tower)
            self._learner = (learner, CategoryIndex())
        return self._learner

    def restore(self, engine: Engine, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the backbone and all tensors that a bundle holds."""
        self._engine = engine
        self.method.load_tensors(tensors["method"])
        self.index.load(tensors["retrieval"])

    # ---- learning -------------------------------------------------------------------------------

    def fit(
        self,
        data: Sequence[Sample],
        *,
        shots: int | None = None,
        calibration: float = 0.2,
        training: TrainingSetup | None = None,
        progress: Progress | None = None,
    ) -> Detector:
        """Run the stages that the method has, on training images of any categories.

        What the detector knew before is replaced, and kept if anything goes wrong.

        Parameters
        ----------
        data
            Samples with a category each, such as ``load_dataset(...).train``; of a generalist the
            source's abnormal ones with masks too.
        shots
            Keep only so many references a category, drawn by ``seed``; all by default.
        calibration
            Share of each category's normal images, the last by name, that is held out from the
            references and calibrates the scores; 0 leaves the detector uncalibrated.
        training
            How the gradient steps run, of a method that takes any.
        progress
            Called with the stage, the images done and the images in all.
        """
        require_learnable(self.spec, data, shots)
        kept, held_out = self._split(data, calibration, shots)  # a slip must not wait for weights
        before = dict(vars(self))
        try:
            _ = self.engine  # loading weights is no part of the stages' time
            self._learner, self.references, self.calibration = None, {}, {}
            self.abnormal, self.trained_on, self.seconds = {}, [], {}
            unseen = self.method.judges_unseen
            if unseen:
                kept, held_out = self._split(data, 0, shots)
                self.setting = "zero-shot"
            names = () if unseen else tuple(dict.fromkeys(category_of(s) for s in kept))
            with self._scratch(training or TrainingSetup()):
                if self.spec.trains_on is not None:
                    self.train(kept, shots is not None, training, progress)
                for name in names:
                    self.enroll(name, [s for s in kept if s.category == name], (), progress)
            if names:
                self.trained_on = []  # the references are the same images
            if held_out:
                self.calibrate(held_out, progress)
        except BaseException:
            vars(self).update(before)
            raise
        self.shots = None if unseen else shots
        if not unseen:
            self.setting = "single" if shots is None else "few-shot"
            if self.spec.multi_class and len(names) > 1:
                self.setting = "multi" if shots is None else "few-shot-multi"
        return self

    def _split(
        self, data: Sequence[Sample], share: float, shots: int | None
    ) -> tuple[Sequence[Sample], Sequence[Sample]]:
        kept, held_out = hold_out(data, share)
        return kept if shots is None else few_shot(kept, shots, self.seed), held_out

    @contextmanager
    def _scratch(self, setup: TrainingSetup) -> Iterator[None]:
        """Keep frozen features on disk while a training goes on: each is computed once."""
        if self.spec.trains_on is None:
            yield
            return
        from anomalyst.training_stage import scratch_cache

        before = self.engine
        try:
            with scratch_cache(before, setup) as self._engine:
                yield
        finally:
            self._engine = before

    def counts(self, category: str) -> dict[str, int]:
        """Return how many references a category has: of both kinds, and masks that were found."""
        bad = self.abnormal.get(category, [])
        return {
            "references": len(self.references.get(category, [])),
            "abnormal": len(bad),
            "masks_found": sum(record.mask == "found" for record in bad),
        }

    @property
    def trains_apart(self) -> bool:
        """Whether training sees a source domain, and the products to judge are enrolled later."""
        return self.spec.generalist

    @property
    def ready(self) -> bool:
        """Whether images can be judged: references are there, or trained weights that need none."""
        return bool(self.references) or (not self.spec.needs_category and self.method.trained)

    def train(
        self,
        data: Sequence[Sample],
        few_shot: bool = False,
        setup: TrainingSetup | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Take the method's gradient steps on training images, from fresh weights.

        References and calibration end with it: they say nothing of the new weights.

        Parameters
        ----------
        data
            What `MethodSpec.trains_on` says, of any categories.
        few_shot
            Whether the images are a few shots, which methods may stretch by changed views.
        setup
            Where and how; by default in one process, and no files are kept.
        progress
            As in `fit`, and with the loss and the time left.

        Raises
        ------
        InputError
            The method is not trained, an image is bad, or the loss became no number.
        """
        from anomalyst.methods.base import TrainedMethod
        from anomalyst.training_stage import train_method

        require_learnable(self.spec, data)
        self._learner = None
        method = self.method
        if not isinstance(method, TrainedMethod):
            raise InputError(f"{self.spec.name} takes no gradient steps: enroll references instead")
        began, setup = time.perf_counter(), setup or TrainingSetup()
        with self._scratch(setup):
            source = train_method(method, self.engine, data, few_shot, setup, progress)
        self.references, self.abnormal, self.calibration = {}, {}, {}
        self.trained_on = source.records
        self.setting, self.shots = "generalist" if self.trains_apart else "zero-shot", None
        self.seconds = {"train": time.perf_counter() - began, "enroll": 0.0}

    def enroll(
        self,
        category: str,
        normal: Sequence[ImageSource] = (),
        abnormal: Sequence[AbnormalSource] = (),
        progress: Progress | None = None,
    ) -> None:
        """Add references of one category: seconds, no gradient. Known ones are passed over.

        The category's calibration ends with it, for it says nothing of the new references; where
        scores depend on the references of all categories, every calibration does.

        Parameters
        ----------
        category
            A new or an enrolled category.
        normal
            Normal images: paths, samples, bytes or uint8 arrays. None are needed where some are
            enrolled already and abnormal ones come.
        abnormal
            Pairs of an abnormal image and its mask, for methods that use them. A mask is a file or
            an array ``[H, W]``, above 0 at the defect; None has it found from the difference to the
            normal references.
        progress
            As in `fit`.

        Raises
        ------
        InputError
            An image or mask is bad or known in the other role, or the abnormal image is of another
            product. What the detector knows stays as it was.
        """
        from anomalyst.enrolment import enroll

        began = time.perf_counter()
        enroll(self, category, normal, abnormal, progress)
        kept = {} if self.method.shares_references else self.calibration
        self.calibration = {name: known for name, known in kept.items() if name != category}
        self.shots, self.setting = None, "generalist" if self.trains_apart else "single"
        spent = self.seconds.get("enroll", 0.0) + time.perf_counter() - began
        self.seconds = {"train": 0.0, **self.seconds, "enroll": spent}

    def calibrate(self, data: Sequence[Sample], progress: Progress | None = None) -> dict[str, int]:
        """Calibrate from held-out normal images; references and repeated images are left out.

        Returns
        -------
        dict
            Number of images used, by category. Replaces those categories' earlier calibration.

        Raises
        ------
        InputError
            A category was not enrolled, an image is bad or anomalous, or nothing is left.
        """
        learned = [*self.references.values(), self.trained_on]
        seen = (record.sha256 for records in learned for record in records)
        bad = {record.sha256: name for name, rows in self.abnormal.items() for record in rows}
        found = calibration_of(self.predict, data, seen, bad, progress)
        for name in found:
            self.references.setdefault(name, [])
        self.calibration |= found
        return {name: known.count for name, known in found.items()}

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
        if not self.ready:
            what = "is trained but knows no product" if self.trained_on else "has learned nothing"
            raise InputError(f"this detector {what} yet: fit or enroll first")
        return judging.predict(TorchJudge(self), images, category, batch_size, keep_pixels)

    @property
    def judges_any(self) -> bool:
        """Whether images of any category can be judged: zero-shot, or nothing is known of any."""
        return not self.spec.needs_category and (self.method.judges_unseen or not self.references)

    def knows(self, category: str) -> bool:
        """Tell whether images of that category can be judged."""
        return category in self.references or self.judges_any

    def heat_unit(self, category: str | None) -> float:
        """Return the map value at which a heat map turns strong: the pixel threshold, if any."""
        threshold = judging.heat_threshold(self.calibration, self.decision, category)
        return threshold or self.method.heat_unit(category)

    # ---- files ----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the whole detector, backbone weights included, as a folder or a ``.zip``.

        Raises
        ------
        InputError
            There is nothing to save yet, or the place cannot be written.
        """
        from anomalyst.persistence import save_detector

        if not (self.ready or (self.trains_apart and self.method.trained)):
            raise InputError("this detector has learned nothing yet: fit or enroll before saving")
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
        options: Mapping[str, Any] | None = None,
    ) -> Detector:
        """Read a bundle; nothing else is read, the network least of all.

        ``options`` are laid over the bundle's own: those that change no weights.

        Raises
        ------
        InputError
            Not a bundle, altered, or of a newer schema.
        """
        from anomalyst.runtime.exported import is_export

        if is_export(Path(path)):
            raise InputError(
                f"{path} is an exported bundle, which only judges images (`anomalyst predict`): "
                "give the bundle that it was made of"
            )
        from anomalyst.persistence import load_detector

        return load_detector(Path(path), device, decision, feature_cache, options or {})
