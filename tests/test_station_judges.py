"""The judging thread: what it says is what the library says, and nothing stops it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra [station] is not installed")

from anomalyst.errors import InputError
from anomalyst.runtime import Runtime
from anomalyst.station.bundles import Kept, keep_bundle
from anomalyst.station.judges import Judges, judge_with
from anomalyst.station.refusals import Refusal
from anomalyst.tiling import Tiling
from station_parts import RED, bad, bundle, good, plain, png, settings
from tiny_export import PREPROCESS, spotted


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return keep_bundle(settings(tmp_path), tmp_path / "plates")


@pytest.fixture
def judges(tmp_path: Path, kept: Kept) -> Iterator[Judges]:
    made = Judges(settings(tmp_path))
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize("tiled", [False, True])
def test_judging_is_the_librarys_with_a_likeness_beside_it(tmp_path: Path, tiled: bool) -> None:
    preprocess = replace(PREPROCESS, tiling=Tiling(16)) if tiled else PREPROCESS
    model = Runtime.load(bundle(tmp_path, preprocess=preprocess.to_dict()))
    wide = png(spotted(RED, (40, 200, 40), 32, 64))
    pictures = [plain(), bad(), wide, b"no picture", bad()]
    found = judge_with(model, pictures, None)
    assert [each.prediction for each in found] == list(model.predict(pictures))
    assert [each.similarity is None for each in found] == [False, False, False, True, False]
    assert found[0].similarity == pytest.approx(1, abs=1e-6)
    # The descriptor is the direction of the mean colour: 15 patches of 16 are red.
    if not tiled:
        colours = PREPROCESS.normalized(spotted(RED, (40, 200, 40))).mean(axis=(1, 2))
        red = PREPROCESS.normalized(np.full((1, 1, 3), RED, np.uint8))[:, 0, 0]
        cosine = colours @ red / np.linalg.norm(colours) / np.linalg.norm(red)
        assert found[1].similarity == pytest.approx(float(cosine), abs=1e-5)
    assert found[1].descriptor is not None
    assert float(np.linalg.norm(found[1].descriptor)) == pytest.approx(1, abs=1e-5)


def test_one_picture_that_breaks_a_batch_spoils_no_other(
    judges: Judges, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Runtime._run

    def failing(self: Runtime, images: np.ndarray, category: str | None) -> dict[str, np.ndarray]:
        if images.max() > 1.9:  # white, and nothing else here
            raise MemoryError("too large")
        return real(self, images, category)

    monkeypatch.setattr(Runtime, "_run", failing)
    import threading

    gate = threading.Event()
    holding = threading.Thread(target=judges.run, args=(gate.wait,))
    holding.start()
    white = png(spotted(RED, (255, 255, 255)))
    waiting = [judges.submit(kept.sha256, kept.kind, c, None) for c in (plain(), white, good(1))]
    gate.set()
    holding.join()
    assert waiting[0].result().prediction.verdict == "ok"
    with pytest.raises(MemoryError):
        waiting[1].result()
    assert waiting[2].result().prediction.error is None


def test_a_picture_that_nobody_waits_for_is_dropped(judges: Judges, kept: Kept) -> None:
    import threading

    gate = threading.Event()
    holding = threading.Thread(target=judges.run, args=(gate.wait,))
    holding.start()
    waiting = [judges.submit(kept.sha256, kept.kind, plain(), None) for _ in range(2)]
    assert waiting[0].cancel()
    gate.set()
    holding.join()
    assert waiting[1].result().prediction.verdict == "ok"


def test_a_model_that_is_gone_is_said(judges: Judges) -> None:
    with pytest.raises(InputError):
        judges.submit("0" * 64, "export", plain(), None).result()
    assert judges.run(lambda: 7) == 7  # and the thread goes on


def test_a_task_that_fails_fails_where_it_was_asked_for(judges: Judges) -> None:
    with pytest.raises(ZeroDivisionError):
        judges.run(lambda: 1 // 0)
    assert judges.run(lambda: 7) == 7


def test_what_waits_when_the_station_stops_is_refused(tmp_path: Path, kept: Kept) -> None:
    made = Judges(settings(tmp_path))  # its thread was never started
    waiting: Future[object] = made.submit(kept.sha256, kept.kind, plain(), None)  # type: ignore[assignment]
    made.stop()
    with pytest.raises(Refusal) as refusal:
        waiting.result()
    assert refusal.value.status == 503
    with pytest.raises(Refusal):
        made.submit(kept.sha256, kept.kind, plain(), None)


def test_few_models_stay_in_memory(tmp_path: Path, judges: Judges) -> None:
    made = settings(tmp_path)
    for k in range(6):
        each = keep_bundle(made, bundle(tmp_path / str(k), alpha=0.1 + k / 100))
        judges.run(lambda each=each: judges.judge(each.sha256, each.kind))  # type: ignore[misc]
    assert len(judges._models) == 4
