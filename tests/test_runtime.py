"""The runtime judges as numpy says it must: scores, categories, verdicts, regions, streams."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalyst import InputError, Sample
from anomalyst.runtime import Runtime
from anomalyst.scoring import Decision
from conftest import save
from tiny_export import COLOURS, PATCH, PREPROCESS, coloured, graph, row, spotted, write

pytest.importorskip("onnx")
RED, BLUE = COLOURS["red"], COLOURS["blue"]
SPOT = (210, 60, 40)
ZERO = pytest.approx(0, abs=1e-9)


class Counted:
    """An engine that notes the sizes of the batches that it runs."""

    def __init__(self, runtime: Runtime) -> None:
        self._engine, self.batches = runtime.engine, []
        self.name, self.inputs, self.outputs = "counted", runtime.engine.inputs, None
        runtime.engine = self

    def run(self, feeds):
        self.batches.append(len(feeds["image"]))
        return self._engine.run(feeds)


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime.load(write(tmp_path / "export"))


ENGINES = (
    pytest.param({}, "auto", id="onnx"),
    pytest.param({"openvino": True}, "auto", id="openvino"),
    pytest.param({}, "openvino", id="onnx in openvino"),
)


def distances(picture: np.ndarray, *good: tuple[int, int, int]) -> np.ndarray:
    """The map that the graph must give, patch after patch."""
    tensor = PREPROCESS(picture).astype(np.float64)
    found = np.empty((tensor.shape[1] // PATCH, tensor.shape[2] // PATCH))
    for r, c in np.ndindex(*found.shape):
        patch = tensor[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
        away = [((patch.mean(axis=(1, 2)) - row(colour)[0]) ** 2).sum() for colour in good]
        found[r, c] = min(away)
    return found


@pytest.mark.parametrize(("made", "engine"), ENGINES)
def test_maps_and_scores_are_the_graphs(tmp_path: Path, made, engine: str) -> None:
    if made or engine == "openvino":
        pytest.importorskip("openvino")
    export = write(tmp_path / "e", {"red": (RED, SPOT), "blue": (BLUE,)}, **made)
    found = Runtime.load(export, engine=engine, threads=1)
    pictures = [spotted(RED, BLUE), spotted(BLUE, RED, 40, 72), coloured(SPOT)]
    names = ["red", "blue", "red"]
    samples = [
        Sample(save(tmp_path / f"{k}.png", p), n)
        for k, (p, n) in enumerate(zip(pictures, names, strict=True))
    ]
    for prediction, picture, name in zip(found.predict(samples), pictures, names, strict=True):
        good = (RED, SPOT) if name == "red" else (BLUE,)
        expected = distances(picture, *good)
        np.testing.assert_allclose(prediction.score_map.values, expected, rtol=1e-5, atol=1e-5)
        assert prediction.score == pytest.approx(expected.max(), rel=1e-5, abs=1e-5)
        assert type(prediction.score) is float and prediction.category == name
        assert prediction.score_map.size == picture.shape[:2] == prediction.map.shape


def test_p_values_verdicts_thresholds_and_regions(tmp_path: Path) -> None:
    """19 held-out images scored 0.5 to 9.5: at 10 % the threshold is the 18th score.

    Between patches the map falls linearly along both axes, an eighth a pixel.
    """
    export = write(tmp_path / "e", calibration={"red": [k / 2 for k in range(1, 20)]})
    runtime = Runtime.load(export)
    far = float(distances(spotted(RED, BLUE), RED).max())
    good, bad, other = runtime.predict([coloured(RED), spotted(RED, BLUE), coloured(BLUE)])
    assert good.score == ZERO and (good.p_value, good.verdict, good.regions) == (1.0, "ok", ())
    assert good.calibrated and good.threshold == 9.0
    assert far > 9.5 and (bad.p_value, bad.verdict, bad.category) == (1 / 20, "ng", "red")
    (region,) = bad.regions
    falls = [abs(k - 3.5) / 8 for k in range(8)]
    heights = [far * (1 - down) * (1 - across) for down in falls for across in falls]
    assert (region.bbox, region.area) == ((10, 18, 4, 4), sum(h > 9 for h in heights))
    assert region.score == pytest.approx(max(heights), rel=1e-5)
    assert (other.category, other.calibrated, other.verdict) == ("blue", False, None)
    runtime.decision = Decision(0.04, 0.06)  # 19 images promise 5 % at best
    (bad,) = runtime.predict(spotted(RED, BLUE))
    assert (bad.verdict, bad.threshold) == ("review", None)
    loose = Runtime.load(export, decision=Decision(0.5, 0.5))
    assert next(loose.predict(coloured(RED))).threshold == 5.0


def test_heat_units_are_thresholds_else_the_categorys_else_the_methods(tmp_path: Path) -> None:
    scores = {"red": [float(k) for k in range(1, 20)], "blue": [0.0] * 19}
    found = Runtime.load(write(tmp_path / "e", calibration=scores))
    assert found.heat_unit("red") == 18.0
    assert found.heat_unit("blue") == 0.7  # a threshold of 0 is no unit
    assert found.heat_unit(None) == found.heat_unit("green") == 0.3


def test_a_category_is_given_the_samples_the_only_one_or_the_most_similar(
    runtime: Runtime, tmp_path: Path
) -> None:
    path = save(tmp_path / "red.png", coloured(RED))
    mixed = [coloured(BLUE), path, Sample(path, "blue"), coloured(RED), coloured(BLUE)]
    found = list(runtime.predict(mixed))
    assert [p.category for p in found] == ["blue", "red", "blue", "red", "blue"]
    between = distances(coloured(RED), BLUE).max()
    assert [p.score for p in found] == pytest.approx([0, 0, between, 0, 0], rel=1e-5, abs=1e-6)
    assert {p.category for p in runtime.predict(mixed, category="red")} == {"red"}
    with pytest.raises(InputError, match="did you mean 'blue'"):
        runtime.predict(mixed, category="blu")
    (unknown,) = runtime.predict(Sample(path, "green"))
    assert "unknown category 'green'" in unknown.error and unknown.score is None
    only = Runtime.load(write(tmp_path / "one", {"red": (RED,)}, retrieval=False))
    assert next(only.predict(coloured(BLUE))).category == "red"
    none = Runtime.load(write(tmp_path / "none", retrieval=False))
    with pytest.raises(InputError, match="unknown category"):
        list(none.predict(coloured(BLUE)))


def test_a_known_category_takes_one_pass_and_a_guessed_one_at_most_two(
    tmp_path: Path,
) -> None:
    export = write(tmp_path / "e")
    pictures = [coloured(RED), coloured(BLUE), coloured(BLUE), spotted(RED, SPOT)]
    known = Counted(runtime := Runtime.load(export))
    list(runtime.predict(pictures, category="blue"))
    assert known.batches == [4]
    guessed = Counted(runtime := Runtime.load(export))
    apart = [p.score for p in runtime.predict(pictures)]
    assert guessed.batches == [4, 2]  # all as the first, two of them again as the second
    guessed.batches.clear()
    list(runtime.predict([coloured(BLUE)] * 5, batch_size=2))
    assert guessed.batches == [2, 2, 1]  # the last image's category is the likeliest
    only = Counted(runtime := Runtime.load(write(tmp_path / "one", {"red": (RED,)})))
    list(runtime.predict(pictures))
    assert only.batches == [4]
    free = write(tmp_path / "free", references=False, needs_category=False)
    shared = Counted(runtime := Runtime.load(free))
    assert [p.category for p in runtime.predict(pictures)] == ["red", "blue", "blue", "red"]
    assert shared.batches == [4]
    alone = Runtime.load(export)
    assert apart == pytest.approx([next(alone.predict(p)).score for p in pictures], abs=1e-6)


def test_without_references_any_category_is_judged_where_the_method_needs_none(
    tmp_path: Path,
) -> None:
    free = {"references": False, "needs_category": False}
    empty = Runtime.load(write(tmp_path / "empty", {}, **free))
    (found,) = empty.predict(coloured(RED), category="anything")
    assert found.category == "anything"
    assert found.score == pytest.approx((row(RED) ** 2).sum(), rel=1e-5)
    assert next(empty.predict(coloured(RED))).category is None
    known = Runtime.load(write(tmp_path / "known", **free))
    assert not known.knows("green") and known.knows("red")
    unseen = Runtime.load(write(tmp_path / "unseen", judges_unseen=True, **free))
    assert unseen.knows("green")
    fed = Runtime.load(write(tmp_path / "fed", judges_unseen=True, needs_category=False))
    assert not fed.knows("green")  # there is nothing to feed in for it


def test_zero_shot_by_name_needs_the_name(tmp_path: Path) -> None:
    named = {"needs_class_name": True, "judges_unseen": True, "needs_category": False}
    runtime = Runtime.load(write(tmp_path / "e", **named))
    assert next(runtime.predict(coloured(RED), category="red")).score == ZERO
    with pytest.raises(InputError, match=r"by-hand needs a class name.*--category"):
        list(runtime.predict(coloured(RED)))


def test_every_kind_of_source_gives_the_same_score(runtime: Runtime, tmp_path: Path) -> None:
    picture = spotted(RED, SPOT)
    path = save(tmp_path / "a.png", picture)
    sources = [path, str(path), path.read_bytes(), picture, Sample(path)]
    found = list(runtime.predict(sources, batch_size=2, keep_pixels=True))
    assert len({p.score for p in found}) == 1 and found[0].score > 0
    names = [str(path), str(path), "image-2", "image-3", str(path)]
    assert [p.image for p in found] == names
    assert len({p.sha256 for p in found}) == 2  # of the file, and of the array
    assert all(np.array_equal(p.pixels, picture) for p in found)


def test_a_stream_may_never_end_and_one_bad_image_spoils_nothing(
    runtime: Runtime, tmp_path: Path
) -> None:
    taken = []

    def camera() -> Iterator[object]:
        while True:
            taken.append(0)
            yield tmp_path / "missing.png" if len(taken) == 2 else coloured(RED)

    stream = runtime.predict(camera(), batch_size=2)
    first, second, third = (next(stream) for _ in range(3))
    assert first.score == third.score == ZERO and "missing.png" in second.error
    stream.close()
    assert len(taken) < 12


def test_a_stranger_is_judged_with_one_warning(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    similar = float(row(RED)[0] @ row(BLUE)[0] / (row(RED) ** 2).sum())  # equally long
    with caplog.at_level(logging.WARNING):
        found = list(runtime.predict([coloured(BLUE)] * 3, category="red"))
    assert all(p.score > 0 for p in found)
    (said,) = [record.message for record in caplog.records]
    assert f"like 'blue' (similarity 1.00), not 'red' ({similar:.2f})" in said


def test_a_fixed_graph_refuses_other_shapes_image_by_image(tmp_path: Path) -> None:
    runtime = Runtime.load(write(tmp_path / "e", size=(32, 48)))
    wide = save(tmp_path / "wide.png", spotted(RED, SPOT, 64, 96))  # resized to 32 x 48
    square = save(tmp_path / "square.png", coloured(RED, 64, 64))
    good, bad, again = runtime.predict([wide, square, wide], category="red")
    assert good.error is None and good.score == again.score
    assert bad.score is None and bad.error.startswith(f"{square}: an image of 64x64 pixels")
    assert "32x32" in bad.error and "32x48 only" in bad.error and "--size" in bad.error
    assert good.score_map.values.shape == (4, 6) and good.map.shape == (64, 96)


@pytest.mark.parametrize(("made", "engine"), ENGINES)
def test_threads_may_share_a_runtime(tmp_path: Path, made, engine: str) -> None:
    if made or engine == "openvino":
        pytest.importorskip("openvino")
    runtime = Runtime.load(write(tmp_path / "e", **made), engine=engine)
    colours = [(200, 40, 40 + 10 * k) for k in range(4)]
    expected = [next(runtime.predict(coloured(c), category="red")).score for c in colours]
    found: dict[int, set[float]] = {k: set() for k in range(4)}

    def judge(k: int) -> None:
        stream = runtime.predict([coloured(colours[k])] * 20, category="red", batch_size=1)
        found[k].update(p.score for p in stream)

    workers = [threading.Thread(target=judge, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[k] for k in range(4)] == [{score} for score in expected]
    assert len(set(expected)) == 4


def test_a_zip_holds_the_same(tmp_path: Path) -> None:
    folder, packed = write(tmp_path / "e"), write(tmp_path / "e.zip")
    picture = io.BytesIO()
    Image.fromarray(spotted(RED, SPOT)).save(picture, "PNG")
    one, other = (next(Runtime.load(p).predict(picture.getvalue())) for p in (folder, packed))
    assert one == other and one.score > 0


def test_a_graph_may_leave_the_descriptor_out_where_nothing_is_looked_up(tmp_path: Path) -> None:
    import onnx

    model = onnx.load_model_from_string(graph())
    del model.graph.output[2]
    lean = {"model": model.SerializeToString()}
    write(tmp_path / "e", {"red": (RED,)}, retrieval=False, **lean)
    assert next(Runtime.load(tmp_path / "e").predict(coloured(RED))).score == ZERO
    write(tmp_path / "f", {"red": (RED,)}, **lean)
    with pytest.raises(InputError, match="not what the manifest says; export the bundle again"):
        Runtime.load(tmp_path / "f")


def test_a_camera_may_wait_for_each_verdict(runtime: Runtime) -> None:
    """One by one, the next picture is asked for only once the last one has its verdict."""
    asked: list[int] = []

    def camera() -> Iterator[np.ndarray]:
        for number in range(3):
            asked.append(number)
            yield coloured(RED)

    for number, found in enumerate(runtime.predict(camera(), category="red", batch_size=1)):
        assert asked == list(range(number + 1)) and found.error is None
    assert asked == [0, 1, 2]


def test_what_is_no_image_is_an_error_of_its_own(runtime: Runtime) -> None:
    mixed = [coloured(RED), None, b"xx", 3.5]
    found = list(runtime.predict(mixed, category="red"))  # type: ignore[arg-type]
    assert [p.error is None for p in found] == [True, False, False, False]
    assert found[1].error == (
        "image-1: NoneType is no image; give a path, bytes, a uint8 array or a Sample"
    )
    for nothing in (None, 3, Image.new("RGB", (8, 8))):
        with pytest.raises(InputError, match="is no image: give a path"):
            runtime.predict(nothing, category="red")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch_size 0: give 1 or more"):
        runtime.predict([coloured(RED)], batch_size=0)
