"""The judging thread: it alone holds models, and what waits for one goes through it together.

torch and the processor are not shared by requests: side by side they would only slow each other
down. Pictures wait in one queue, and those for the same model and category are judged as a batch.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import numpy as np

from anomalyst import judging
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.inference import Item
from anomalyst.retrieval import pooled
from anomalyst.runtime import Runtime
from anomalyst.station.bundles import bundle_folder
from anomalyst.station.refusals import Refusal
from anomalyst.station.settings import Settings
from anomalyst.torch_judge import TorchJudge
from anomalyst.types import FloatArray, Prediction

_BATCH = 8
_MODELS = 4  # kept in memory, those used last
_WAITING_BYTES = 512 << 20
_T = TypeVar("_T")
Model = Detector | Runtime


@dataclass(frozen=True)
class Judged:
    """What was found of one picture.

    ``descriptor`` is its unit vector ``[C]`` and ``similarity`` its cosine to the nearest normal
    reference of its category, where the model has such; ``heat_unit`` the map's value at which it
    turns strong.
    """

    prediction: Prediction
    descriptor: FloatArray | None
    similarity: float | None
    heat_unit: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Ticket:
    """A picture that waits: which model, its bytes, its category."""

    sha256: str
    kind: str
    content: bytes
    category: str | None
    result: Future[Judged]

    @property
    def group(self) -> tuple[str, str | None]:
        """Pictures of one group are judged together."""
        return self.sha256, self.category


class Judges:
    """Models by their bundle's hash, and the one thread that uses them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._pictures: deque[Ticket] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="judging", daemon=True)

    def start(self) -> None:
        """Start judging."""
        self._thread.start()

    def stop(self) -> None:
        """End after what is being judged; whatever still waits is refused."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for waiting in (*(t.result for t in self._pictures), *(f for _, f in self._tasks)):
            if waiting.set_running_or_notify_cancel():
                waiting.set_exception(Refusal(503, "the station is stopping", retry=10))

    @property
    def waiting(self) -> int:
        """How many pictures wait."""
        return len(self._pictures)

    def submit(
        self, sha256: str, kind: str, content: bytes, category: str | None
    ) -> Future[Judged]:
        """Let a picture wait to be judged.

        Raises
        ------
        Refusal
            503: too many wait already.
        """
        ticket = Ticket(sha256, kind, content, category, Future())
        with self._wake:
            held = sum(len(each.content) for each in self._pictures) + len(content)
            full = len(self._pictures) >= self._settings.waiting or held > _WAITING_BYTES
            if self._stopping or (full and self._pictures):
                raise Refusal(503, "too many pictures wait to be judged: send it again", retry=1)
            self._pictures.append(ticket)
            self._wake.notify()
        return ticket.result

    def run(self, task: Callable[[], _T]) -> _T:
        """Run a function on the judging thread, between pictures, and return what it returns."""
        result: Future[_T] = Future()
        with self._wake:
            if self._stopping:
                raise Refusal(503, "the station is stopping", retry=10)
            self._tasks.append((task, result))
            self._wake.notify()
        return result.result()

    # ---- on the judging thread ------------------------------------------------------------------

    def judge(self, sha256: str, kind: str) -> Model:
        """Return the model of a kept bundle; only for functions that `run` runs."""
        if sha256 not in self._models:
            self._models[sha256] = load_model(self._settings, sha256, kind)
        self._models.move_to_end(sha256)
        while len(self._models) > _MODELS:
            self._models.popitem(last=False)
        return self._models[sha256]

    def judge_images(
        self, sha256: str, kind: str, contents: Sequence[bytes], category: str | None
    ) -> list[Judged]:
        """Judge pictures by a kept bundle; only for functions that `run` runs."""
        return judge_with(self.judge(sha256, kind), contents, category)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._pictures or self._tasks or self._stopping)
                if self._stopping:
                    return
                batch = self._take()
                task = self._tasks.popleft() if self._tasks else None
            if batch:
                self._settle(batch)
            if task is not None:
                _settle_task(*task)

    def _take(self) -> list[Ticket]:
        """Take the oldest picture and those that can be judged with it."""
        if not self._pictures:
            return []
        group = self._pictures[0].group
        batch = [each for each in self._pictures if each.group == group][:_BATCH]
        for each in batch:
            self._pictures.remove(each)
        return [each for each in batch if each.result.set_running_or_notify_cancel()]

    def _settle(self, batch: Sequence[Ticket]) -> None:
        """Judge a batch; where it fails as a whole, each picture alone, so that one spoils none."""
        sha256, category = batch[0].group
        try:
            found = self.judge_images(sha256, batch[0].kind, [t.content for t in batch], category)
        except Exception as error:
            if len(batch) == 1 or isinstance(error, (InputError, Refusal)):
                for ticket in batch:
                    ticket.result.set_exception(error)
                return
            for ticket in batch:
                self._settle([ticket])
            return
        for ticket, judged in zip(batch, found, strict=True):
            ticket.result.set_result(judged)


def _settle_task(task: Callable[[], Any], result: Future[Any]) -> None:
    try:
        result.set_result(task())
    except BaseException as error:
        result.set_exception(error)


def load_model(settings: Settings, sha256: str, kind: str) -> Model:
    """Read a kept bundle: with torch, or, of an export, without."""
    folder = bundle_folder(settings, sha256)
    if kind == "export":
        return Runtime.load(folder)
    if find_spec("torch") is None:
        raise InputError(
            "a bundle needs torch (pip install 'anomalyst[train]'); without it, serve an export "
            "(`anomalyst export`)"
        )
    return Detector.load(folder, device=settings.device)


def judge_with(model: Model, contents: Sequence[bytes], category: str | None) -> list[Judged]:
    """Judge pictures by a model, with their descriptors and likeness to its references."""
    began = time.perf_counter()
    noting = _Noting(model if isinstance(model, Runtime) else TorchJudge(model))
    judge = cast(judging.Judge, noting)
    found = list(judging.predict(judge, list(contents), category, _BATCH, False))
    seconds = (time.perf_counter() - began) / len(contents)
    result = []
    for prediction in found:
        descriptor = noting.descriptor(prediction.sha256)
        similar = {} if descriptor is None else noting.compare(descriptor[None])[0]
        unit = model.heat_unit(prediction.category) if prediction.error is None else 0.0
        result.append(
            Judged(prediction, descriptor, similar.get(prediction.category or ""), unit, seconds)
        )
    return result


class _Noting:
    """A judge that remembers the descriptors of what it looked at, by the pictures' hashes."""

    def __init__(self, judge: Runtime | TorchJudge) -> None:
        self._judge = judge
        self._described: dict[str, list[FloatArray]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)

    def compare(self, descriptors: FloatArray) -> Sequence[Mapping[str, float]]:
        return self._judge.compare(descriptors)

    def look(self, items: Sequence[Item], likely: str | None) -> judging.Glance:
        glance = self._judge.look(items, likely)
        for item, row in zip(items, glance.descriptors(), strict=True):
            picture = item.sha256.split(" ")[0]  # of a tile, "HASH PLACE"
            self._described.setdefault(picture, []).append(row[None])
        return glance

    def descriptor(self, sha256: str) -> FloatArray | None:
        """Return a picture's unit vector, that of its tiles together; None without any."""
        rows = self._described.get(sha256)
        if not rows or not rows[0].shape[1]:
            return None
        whole: FloatArray = np.asarray(pooled(rows)[0], dtype=np.float32)
        return whole
