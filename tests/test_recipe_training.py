"""Frame and tiles in training, and in what abnormal references teach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalyst import Detector, Frame, InputError, Sample
from anomalyst.data.transforms import Preprocess
from anomalyst.engine import Engine
from anomalyst.features.cache import FeatureCache
from anomalyst.inference import Part, network_inputs, read_item
from anomalyst.methods.anople_views import Views
from anomalyst.methods.prompted import Prompted
from anomalyst.methods.synthesis import Synthetic
from anomalyst.methods.views import PLAIN, turned
from anomalyst.tiling import Tile, Tiling
from anomalyst.training_data import TrainingFeatures
from conftest import DEEP, blot, save, texture
from test_frame import corner, scrambled, smooth
from test_prompted import Patches

PREPROCESS = Preprocess(64, 8, (0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
TILED = replace(PREPROCESS, tiling=Tiling(32, overview=True))
MASK = corner(96, 96, 40, 60)


class Black:
    """A pseudo-anomaly that is everywhere, whatever it is asked for."""

    recipe = "hybrid"

    def __call__(self, image: np.ndarray, *_: object) -> Synthetic:
        return Synthetic(0 * image, np.ones(image.shape[:2], dtype=bool))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two good images, and a bad one whose defect is in the lower right corner."""
    paths = [save(tmp_path / f"{k}.png", smooth(k, 96, 96 + 48 * k)) for k in range(2)]
    bad = save(tmp_path / "bad.png", blot(smooth(5, 96, 144), 70, 120, 15))
    mask = np.zeros((96, 144), np.uint8)
    mask[70:85, 120:135] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    good = [Sample(path, "plate", 0, "good") for path in paths]
    return [*good, Sample(bad, "plate", 1, "blot", tmp_path / "mask.png")]


def features_of(
    samples: list[Sample], preprocess: Preprocess, folder: Path | None = None, views: Any = (PLAIN,)
) -> TrainingFeatures:
    cache = None if folder is None else FeatureCache(folder)
    engine = Engine(Patches(), preprocess, torch.device("cpu"), cache)
    return TrainingFeatures(engine, samples, views)


# ---- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_training_images_are_their_tiles(
    samples: list[Sample], tmp_path: Path, cached: bool
) -> None:
    views = turned(2)
    found = features_of(samples[:2], TILED, tmp_path / "cache" if cached else None, views)
    expected = []
    for sample in samples[:2]:
        item = read_item(sample, "x", TILED)
        expected += [part for _, parts in network_inputs(item, TILED) for part in parts]
    assert len(expected) == 3 * 3 + 1 + 3 * 4 + 1
    assert len(found) == 2 * len(expected) and len(found.records) == 2
    plain = Engine(Patches(), PREPROCESS, torch.device("cpu"))
    for number in range(len(found)):
        item, view = expected[number // 2], views[number % 2]
        ((maps,),) = found.fetch([number])
        torch.testing.assert_close(maps, plain.features([item], view)[0], atol=5e-3, rtol=1e-3)
        place = found.place(number)
        assert place.box == item.box and place.input == item.tensor.shape[1:]
    assert isinstance(found.samples[0], Part) and found.samples[0].tile == Tile(0, 0, 4, 4)
    assert found.samples[9].tile is None and found.samples[0].path == samples[0].path


def test_of_abnormal_images_the_tiles_that_show_the_defect(samples: list[Sample]) -> None:
    found = features_of(samples[2:], TILED)
    # 144 x 96 pixels become 12 x 8 patches; the defect covers columns 10 to 11.25, rows 5.8 to 7.1.
    tiles = [sample.tile for sample in found.samples]
    assert tiles == [Tile(2, 8, 4, 4), Tile(4, 8, 4, 4), None]
    nothing = replace(samples[2], mask=None)
    assert len(features_of([nothing], TILED)) == 3 * 4 + 1


def test_ignored_parts_of_a_defect_are_not_learned(samples: list[Sample]) -> None:
    over = np.zeros((96, 144), bool)
    over[:, 126:] = True
    found = features_of(samples[2:], replace(PREPROCESS, frame=Frame(ignore=over)))
    marked = np.zeros((96, 144), bool)
    marked[70:85, 120:135] = True
    left = found.place(0).counted(marked)
    assert left.sum() == 15 * 6 and not left[:, 126:].any()


@pytest.fixture
def nagl(deep_weights: str) -> Callable[..., Detector]:
    def build(**more: Any) -> Detector:
        detector = Detector("nagl", backbone=DEEP, weights=deep_weights, **more)
        detector.method.trained = True
        detector.enroll("plate", [texture(k) for k in range(2)])
        return detector

    return build


def test_abnormal_references_in_tiles(nagl: Callable[..., Detector]) -> None:
    detector, bad = nagl(image_size=96, tile=64), blot(texture(5), 66, 70, 20)
    defect = np.zeros((96, 96), np.uint8)
    defect[66:86, 70:90] = 1
    with pytest.raises(InputError, match="in tiles an abnormal reference needs its mask"):
        detector.enroll("plate", (), [(bad, None)])
    taken: list[int] = []
    known = detector.method.enroll_abnormal
    detector.method.enroll_abnormal = lambda name, shown: (
        taken.extend(int(each.mask.sum()) for each in shown), known(name, shown)
    )  # fmt: skip
    detector.enroll("plate", (), [(bad, defect)])
    assert taken == [20 * 20]  # one of four tiles of 64 holds all of it; the others begin at 0
    assert len(detector.abnormal["plate"]) == 1
    good, spoilt = detector.predict([texture(7), blot(texture(7), 66, 70, 20)])
    assert spoilt.score > good.score


def test_a_defect_outside_the_region_teaches_nothing(nagl: Callable[..., Detector]) -> None:
    detector = nagl(image_size=96, tile=64, frame=Frame(crop=(0, 0, 60, 60)))
    defect = np.zeros((96, 96), np.uint8)
    defect[66:86, 70:90] = 1
    with pytest.raises(InputError, match="its defect lies outside the part"):
        detector.enroll("plate", (), [(blot(texture(5), 66, 70, 20), defect)])


# ---- what is ignored, in pseudo-anomalies -------------------------------------------------------


def test_no_pseudo_anomaly_of_onenip_lies_where_images_are_ignored(samples: list[Sample]) -> None:
    framed = replace(PREPROCESS, frame=Frame(ignore=MASK))
    source = Prompted(features_of(samples[:1], framed), Black(), 0, "random", 0)
    ((clean, pseudo, masks, _),) = source.fetch([0], 0)
    hidden = read_item(samples[0], "x", framed).hidden(64, 64)
    np.testing.assert_array_equal(masks[0].bool().numpy(), ~hidden)
    blank = hidden.reshape(8, 8, 8, 8).all(axis=(1, 3))
    assert blank.sum() == 3 * 5
    assert torch.equal(pseudo[0][:, blank], clean[0][:, blank])
    assert (pseudo[0][:3, blank] == 0).all() and (pseudo[0][:3, ~blank] != 0).any(0).all()


def test_views_of_anople_are_0_where_images_are_ignored(samples: list[Sample]) -> None:
    framed = replace(PREPROCESS, frame=Frame(ignore=MASK))
    engine = SimpleNamespace(preprocess=framed, device=torch.device("cpu"))
    known = SimpleNamespace(samples=samples[:1], engine=engine)
    ((clean, pseudo, masks, _, _),) = Views(known, Black(), 5, 1.0, 0).fetch([0], 0)
    item = read_item(samples[0], "x", framed.doubled)
    large = item.hidden(128, 128)
    for k, (rows, columns) in enumerate(((0, 0), (0, 64), (64, 0), (64, 64)), start=1):
        hidden = large[rows : rows + 64, columns : columns + 64]
        for views in (clean, pseudo):
            assert (views[0, k][:, hidden] == 0).all()
        assert (pseudo[0, k][:, ~hidden] != 0).all()
        np.testing.assert_array_equal(masks[0, k].bool().numpy(), ~hidden)
    assert (clean[0, 0][:, :26, :40] == 0).all() and (clean[0, 0] != 0).any(0)[27:, 41:].all()


def test_training_sees_nothing_of_ignored_pixels(
    deep_weights: str, tmp_path: Path, samples: list[Sample]
) -> None:
    """Two trainings whose images differ where they are ignored end at the same weights."""
    found = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        paths = [save(folder / f"{k}.png", scrambled(texture(k), MASK, seed + k)) for k in range(3)]
        detector = Detector(
            "inp-former",
            backbone=DEEP,
            weights=deep_weights,
            image_size=96,
            frame=Frame(ignore=MASK),
            options={"steps": 3, "warmup": 1, "batch_size": 2},
        )
        detector.train([Sample(path, "plate", 0, "good") for path in paths])
        found.append(detector.method.tensors())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
