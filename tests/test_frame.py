"""Region of interest, ignore mask and alignment: the same pixels count everywhere, no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalyst import Detector, InputError, evaluate, load_dataset
from anomalyst.data.alignment import find_shift, grey
from anomalyst.data.frame import ALIKE, Frame, parse_rectangle
from anomalyst.data.masks import Ignored
from anomalyst.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from anomalyst.inference import read_item
from anomalyst.metrics import PixelMetrics
from anomalyst.scoring import render
from anomalyst.tiling import Tiling
from anomalyst.types import ScoreMap
from conftest import TINY, Run, blot, save, texture

PLAIN = Preprocess(32, 8, IMAGENET_MEAN, IMAGENET_STD)


def smooth(seed: int, height: int, width: int, cell: int = 8) -> np.ndarray:
    """A picture of soft spots, as different everywhere as photographs are."""
    random = np.random.default_rng(seed)
    rough = random.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
    picture = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture).copy()


def moved(picture: np.ndarray, right: int, down: int) -> np.ndarray:
    """The picture's content, shifted; what comes in from outside is noise."""
    height, width = picture.shape[:2]
    found = smooth(99, height, width)
    to = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
    of = slice(max(-down, 0), height - max(down, 0)), slice(max(-right, 0), width - max(right, 0))
    found[to] = picture[of]
    return found


def scrambled(picture: np.ndarray, where: np.ndarray, seed: int = 0) -> np.ndarray:
    """The picture with random pixels where a mask says so."""
    found = picture.copy()
    found[where] = np.random.default_rng(seed).integers(0, 256, (where.sum(), 3))
    return found


def corner(height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """A mask of the upper left corner."""
    mask = np.zeros((height, width), dtype=bool)
    mask[:rows, :columns] = True
    return mask


# ---- alignment ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift", [(0, 0), (1, 0), (-7, 3), (20, -20), (-20, 20), (13, 20), (-20, -20)]
)
def test_known_shifts_are_found_exactly(shift: tuple[int, int]) -> None:
    golden = smooth(1, 120, 160)
    template = grey(golden)[40:70, 50:98]
    *found, fit = find_shift(moved(golden, *shift), template, (50, 40), 20)
    assert tuple(found) == shift
    assert fit == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("place", "shift"),
    [
        ((0, 0), (5, 0)),
        ((0, 0), (0, 0)),
        ((3, 2), (-3, -2)),
        ((112, 90), (0, 0)),
        ((110, 85), (2, 5)),
    ],
)
def test_near_the_border_too(place: tuple[int, int], shift: tuple[int, int]) -> None:
    """Where the search leaves the image, what is left of it is searched."""
    golden = smooth(2, 120, 160)
    template = grey(golden)[place[1] : place[1] + 30, place[0] : place[0] + 48]
    right, down, fit = find_shift(moved(golden, *shift), template, place, 30)
    assert (right, down) == shift and fit == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("shift", [(0, 0), (301, -199), (-397, 203), (5, 400), (-400, -400)])
@pytest.mark.parametrize("cell", [2, 40])
def test_large_searches_go_by_a_reduced_image_and_end_on_the_pixel(
    shift: tuple[int, int], cell: int
) -> None:
    """Also where the picture is fine: blocks of the reduced one then mix its spots anew."""
    golden = smooth(3, 1200, 1500, cell)
    template = grey(golden)[500:660, 600:800]
    right, down, fit = find_shift(moved(golden, *shift), template, (600, 500), 400)
    assert (right, down) == shift and fit == pytest.approx(1, abs=1e-9)


def test_light_and_noise_change_the_fit_and_not_the_place() -> None:
    golden = smooth(4, 120, 160)
    noise = np.random.default_rng(0).normal(0, 10, golden.shape)
    darker = (moved(golden, 6, -4) * 0.6 + 20 + noise).clip(0, 255).astype(np.uint8)
    right, down, fit = find_shift(darker, grey(golden)[40:70, 50:98], (50, 40), 20)
    assert (right, down) == (6, -4)
    assert 0.9 < fit < 1


def test_correlation_is_that_of_numpy() -> None:
    golden, other = smooth(5, 60, 60), smooth(6, 60, 60)
    template = grey(golden)[20:40, 20:45]
    right, down, fit = find_shift(other, template, (20, 20), 5)
    pixels = grey(other).astype(float)
    fits = {
        (x, y): np.corrcoef(
            pixels[20 + y : 40 + y, 20 + x : 45 + x].ravel(), template.ravel().astype(float)
        )[0, 1]
        for x in range(-5, 6)
        for y in range(-5, 6)
    }
    assert max(fits, key=fits.get) == (right, down)
    assert fit == pytest.approx(fits[right, down], abs=1e-9)


def test_a_flat_picture_fits_nowhere() -> None:
    template = grey(smooth(1, 20, 20))
    assert find_shift(np.full((60, 60, 3), 90, np.uint8), template, (20, 20), 5)[2] == 0


# ---- preprocessing ------------------------------------------------------------------------------


def test_a_region_is_the_same_as_the_part_cut_out() -> None:
    picture = smooth(1, 90, 140)
    framed = replace(PLAIN, frame=Frame(crop=(20, 10, 60, 70)))
    np.testing.assert_array_equal(framed(picture), PLAIN(picture[10:80, 20:80]))
    assert framed.output_size(90, 140) == PLAIN.output_size(70, 60)
    assert framed.see(picture).box == framed.box(90, 140) == (10, 20, 70, 60)


def test_a_presets_crop_lies_in_the_region() -> None:
    framed = replace(PLAIN, resize=40, frame=Frame(crop=(20, 10, 80, 60)))
    picture = smooth(1, 90, 140)
    np.testing.assert_array_equal(
        framed(picture), replace(PLAIN, resize=40)(picture[10:70, 20:100])
    )
    top, left, height, width = replace(PLAIN, resize=40).box(60, 80)
    assert framed.box(90, 140) == (top + 10, left + 20, height, width)


def test_alignment_takes_region_and_mask_along() -> None:
    golden = smooth(1, 120, 160)
    mask = np.zeros((120, 160), bool)
    mask[50:60, 70:90] = True
    frame = Frame.read(
        crop=(40, 30, 80, 60), ignore=mask, golden=golden, align_on=(50, 35, 40, 30), search=15
    )
    framed = replace(PLAIN, frame=frame)
    still, away = framed.see(golden), framed.see(moved(golden, 9, -12))
    np.testing.assert_array_equal(still.tensor, away.tensor)
    assert (still.box, away.box) == ((30, 40, 60, 80), (18, 49, 60, 80))
    assert (still.tensor == 0).all(0).any()


@pytest.mark.parametrize("size", [(96, 128), (48, 64), (97, 129), (192, 256)])
def test_ignored_pixels_are_zero_and_reach_no_other(size: tuple[int, int]) -> None:
    """Masks of any size are laid over the image by nearest neighbour."""
    mask = corner(*size, size[0] // 3, size[1] // 2)
    framed = replace(PLAIN, frame=Frame(ignore=mask))
    picture = smooth(1, 96, 128)
    rows = (np.arange(96) + 0.5) * size[0] / 96
    columns = (np.arange(128) + 0.5) * size[1] / 128
    where = mask[np.ix_(rows.astype(int), columns.astype(int))]
    first = framed(picture)
    np.testing.assert_array_equal(framed(scrambled(picture, where)), first)
    assert (first[:, :10, :20] == 0).all()
    assert (first != 0).any(0)[12:, 24:].all()
    np.testing.assert_array_equal(first[:, 12:, 24:], PLAIN(picture)[:, 12:, 24:])


def test_the_frame_in_json_and_arrays() -> None:
    golden = smooth(1, 60, 80)
    frame = Frame.read(
        crop=(1, 2, 50, 40), ignore=corner(60, 80, 5, 5), golden=golden, align_on=(5, 6, 20, 10)
    )
    framed = replace(PLAIN, frame=frame)
    values = json.loads(json.dumps(framed.to_dict()))
    again = Preprocess.from_dict(values, frame.arrays())
    assert again == framed and hash(again) == hash(framed)
    assert again != replace(framed, frame=replace(frame, ignore=corner(60, 80, 5, 6)))
    assert "frame" not in PLAIN.to_dict()
    other = {**frame.arrays(), "ignore": corner(60, 80, 6, 5)}
    for arrays in ({}, other):
        with pytest.raises(InputError, match="arrays are not those"):
            Preprocess.from_dict(values, arrays)


# ---- what is refused, in one line ---------------------------------------------------------------


def error_of(image: np.ndarray, frame: Frame) -> str:
    """What is said of one image."""
    error = read_item(image, "part.png", replace(PLAIN, frame=frame)).error
    assert error is not None and error.startswith("part.png: ") and "\n" not in error
    return error


def test_images_that_do_not_fit_their_frame() -> None:
    picture = smooth(1, 60, 80)
    assert "region 40,10,50,20 (x,y,width,height) reaches out of an image of 80x60" in error_of(
        picture, Frame(crop=(40, 10, 50, 20))
    )
    assert "ignore mask is 60x60 pixels and the image 80x60" in error_of(
        picture, Frame(ignore=corner(60, 60, 5, 5))
    )
    assert "leaves nothing of the region" in error_of(
        picture, Frame(crop=(0, 0, 20, 20), ignore=corner(60, 80, 30, 30))
    )
    assert (
        "an image of 80x60 pixels is smaller than the golden sample's patch of 90x20"
        in error_of(picture, Frame(template=grey(smooth(1, 20, 90))))
    )
    template = grey(smooth(1, 200, 200))[150:170, 150:170]
    assert "does not look like the golden sample (correlation -1.00" in error_of(
        picture, Frame(template=template, place=(150, 150))
    )


def test_another_product_and_one_that_is_moved_too_far() -> None:
    golden = smooth(1, 120, 160)
    frame = Frame.read(crop=(2, 2, 156, 116), golden=golden, align_on=(50, 35, 40, 30), search=15)
    assert "does not look like the golden sample (correlation 0." in error_of(
        smooth(2, 120, 160), frame
    )
    assert f"{ALIKE} is needed" in error_of(moved(golden, 40, 0), frame)
    assert "9 pixels too far right and 5 pixels too far up, and its region reaches out" in error_of(
        moved(golden, 9, -5), frame
    )


def test_frames_that_mean_nothing() -> None:
    golden = smooth(1, 60, 80)
    with pytest.raises(InputError, match="region 0,0,0,5: x and y start at 0"):
        Frame(crop=(0, 0, 0, 5))
    with pytest.raises(InputError, match="ignores the whole image"):
        Frame(ignore=np.ones((4, 4), bool))
    with pytest.raises(InputError, match="give booleans"):
        Frame(ignore=np.zeros((4, 4)))
    with pytest.raises(InputError, match="all of one grey"):
        Frame(template=np.full((9, 9), 7, np.uint8))
    with pytest.raises(InputError, match="search 0"):
        Frame(search=0)
    with pytest.raises(InputError, match="give both"):
        Frame.read(golden=golden)
    with pytest.raises(InputError, match="70,0,20,20 reaches out of the golden sample of 80x60"):
        Frame.read(golden=golden, align_on=(70, 0, 20, 20))
    for text in ("1,2,3", "a,b,c,d", "1,2,3,4,5", ""):
        with pytest.raises(InputError, match="give X,Y,W,H in pixels"):
            parse_rectangle("--roi", text)
    assert parse_rectangle("--roi", "1, 2,3,4") == (1, 2, 3, 4)


def test_masks_and_golden_samples_from_files(tmp_path: Path) -> None:
    golden = smooth(1, 60, 80)
    image, mask = save(tmp_path / "g.png", golden), tmp_path / "m.png"
    Image.fromarray(corner(60, 80, 5, 7).astype(np.uint8) * 255).save(mask)
    read = Frame.read(ignore=mask, golden=image, align_on=(5, 6, 20, 10))
    assert read == Frame.read(ignore=corner(60, 80, 5, 7), golden=golden, align_on=(5, 6, 20, 10))


# ---- maps, regions, metrics ---------------------------------------------------------------------


def test_ignored_parts_of_a_map_are_its_lowest() -> None:
    values = np.arange(16, dtype=np.float32).reshape(4, 4) + 5
    mask = np.zeros((40, 60), bool)
    mask[20:40, 15:60] = True
    ignored = Ignored(mask, (40, 60), (0, 0))
    plain = ScoreMap(values, (40, 60), 0.5, (0.0, 0.0, 40.0, 60.0))
    full, expected = render(replace(plain, ignored=ignored), 40, 60), render(plain, 40, 60)
    assert (full[mask] == expected.min()).all()
    np.testing.assert_array_equal(full[~mask], expected[~mask])
    half = render(replace(plain, ignored=ignored), 20, 30)
    assert (half[10:, 8:] == half.min()).all() and (half[:10].max(1) > half.min()).all()


def test_a_moved_mask_goes_on_beyond_its_border() -> None:
    mask = corner(10, 10, 4, 10)
    found = Ignored(mask, (20, 20), (-3, 0)).at((0.0, 0.0, 20.0, 20.0), (20, 20))
    np.testing.assert_array_equal(found, corner(20, 20, 5, 20))
    found = Ignored(mask, (20, 20), (3, 0)).at((0.0, 0.0, 20.0, 20.0), (20, 20))
    np.testing.assert_array_equal(found, corner(20, 20, 11, 20))


def test_ignored_pixels_count_for_nothing_in_pixel_metrics() -> None:
    random = np.random.default_rng(0)
    maps = random.random((3, 20, 30)).astype(np.float32)
    mask = np.zeros((20, 30), bool)
    mask[5:12, 3:25] = True
    ignored = np.zeros((20, 30), bool)
    ignored[:, 10:15] = True  # leaves two regions of the defect
    with_mask, by_hand = PixelMetrics(), PixelMetrics()
    for scores, truth in zip(maps, (mask, None, mask), strict=True):
        with_mask.update(scores, truth, ignored=ignored)
        for part in (slice(0, 10), slice(15, 30)):
            by_hand.update(scores[:, part], None if truth is None else truth[:, part])
    assert with_mask.result().metrics() == pytest.approx(by_hand.result().metrics(), abs=1e-12)


# ---- a detector ---------------------------------------------------------------------------------

HIDDEN = np.zeros((96, 96), bool)
HIDDEN[40:88, 24:60] = True


@pytest.fixture
def make(tiny_weights: str) -> Callable[..., Detector]:
    def build(**more: object) -> Detector:
        settings = {"backbone": TINY, "weights": tiny_weights, "image_size": 96, **more}
        return Detector("anomaly-dino", **settings)

    return build


def test_defects_beside_the_mask_are_found_and_under_it_are_not(
    make: Callable[..., Detector], make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts(good=30))
    detector = make(frame=Frame(ignore=HIDDEN)).fit(data.train, calibration=0.7)
    plain, under, beside = detector.predict(
        [texture(700), blot(texture(700), 48, 28, 24), blot(texture(700), 8, 60, 24)],
        category="plate",
    )
    assert under.score == plain.score
    np.testing.assert_array_equal(under.map, plain.map)
    assert not under.regions and beside.regions
    values = beside.score_map.values  # patches of 16 pixels; two of them are ignored altogether
    assert (values[3:5, 2] == values.min()).all() and (values == values.min()).sum() == 3
    assert (beside.map[HIDDEN] == beside.map.min()).all()
    for region in beside.regions:
        x, y, width, height = region.bbox
        inside = HIDDEN[y : y + height, x : x + width]
        assert region.area <= (~inside).sum()


def test_the_feature_cache_tells_frames_apart(
    make: Callable[..., Detector], tmp_path: Path
) -> None:
    from anomalyst.features.cache import FeatureCache

    cache, found = FeatureCache(tmp_path / "cache"), []
    for frame in (None, Frame(ignore=HIDDEN), Frame(ignore=HIDDEN.T.copy())):
        detector = make(frame=frame, feature_cache=cache)
        detector.enroll("plate", [texture(0)])
        (judged,) = detector.predict([blot(texture(1), 8, 60, 24)])
        found.append(judged.score)
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", ["bundle", "bundle.zip"])
def test_a_frame_is_saved_and_loaded(
    make: Callable[..., Detector], tmp_path: Path, name: str
) -> None:
    golden = smooth(7, 120, 160)
    frame = Frame.read(
        crop=(40, 10, 100, 96),
        ignore=corner(120, 160, 40, 60),
        golden=golden,
        align_on=(50, 30, 50, 40),
        search=12,
    )
    detector = make(frame=frame)
    detector.enroll("plate", [golden, moved(golden, 3, 2)])
    detector.save(tmp_path / name)
    again = Detector.load(tmp_path / name)
    assert again.engine.preprocess == detector.engine.preprocess and again.frame == frame
    picture = blot(moved(golden, -4, 6), 70, 90, 20)
    (one,), (two,) = detector.predict([picture]), again.predict([picture])
    assert one.score == two.score and one.score_map.box == (16, 36, 96, 100)
    np.testing.assert_array_equal(one.map, two.map)


def test_evaluation_leaves_ignored_pixels_out(
    make: Callable[..., Detector], make_parts: Callable[..., Path]
) -> None:
    """The blots lie at columns 48 to 72: a mask over all of them leaves no defect pixel."""
    data = load_dataset(make_parts())
    over = np.zeros((96, 96), bool)
    over[:, 40:80] = True
    hidden = evaluate(make(frame=Frame(ignore=over)).fit(data.train, calibration=0), data)
    assert hidden.metrics["mean"]["p_ap"] is None
    seen = evaluate(make(frame=Frame(ignore=over.T.copy())).fit(data.train, calibration=0), data)
    assert seen.metrics["mean"]["p_auroc"] > 0.9


def test_abnormal_references_lose_what_is_ignored_of_their_defect(deep_weights: str) -> None:
    from conftest import DEEP

    detector = Detector(
        "nagl",
        backbone=DEEP,
        weights=deep_weights,
        image_size=96,
        frame=Frame(ignore=HIDDEN),
    )
    detector.method.trained = True
    detector.enroll("plate", [texture(k) for k in range(2)])
    bad = blot(texture(5), 48, 28, 24)
    defect = np.zeros((96, 96), np.uint8)
    defect[48:72, 28:52] = 1
    with pytest.raises(InputError, match="all of its defect is ignored"):
        detector.enroll("plate", (), [(bad, defect)])
    defect[2:10, 2:10] = 1
    detector.enroll("plate", (), [(bad, defect)])
    assert detector.abnormal["plate"][0].mask == "given"


# ---- the command line ---------------------------------------------------------------------------


def test_fit_takes_the_whole_recipe(
    run: Run, make_parts: Callable[..., Path], tiny_weights: str, tmp_path: Path
) -> None:
    parts = make_parts()
    golden = parts / "plate" / "train" / "good" / "000.png"
    mask = tmp_path / "mask.png"
    Image.fromarray(HIDDEN.astype(np.uint8)).save(mask)
    code, _, err = run(
        "fit", "anomaly-dino", parts, "-o", tmp_path / "bundle", "--backbone", TINY,
        "--weights", tiny_weights, "--image-size", 128, "--tile", 64, "--overlap", 0.5,
        "--overview", "--roi", "8,8,80,80", "--ignore", mask, "--align", golden,
        "--align-on", "20,20,40,40", "--search", 6,
    )  # fmt: skip
    assert code == 0, err
    detector = Detector.load(tmp_path / "bundle")
    expected = Frame.read(
        crop=(8, 8, 80, 80), ignore=HIDDEN, golden=golden, align_on=(20, 20, 40, 40), search=6
    )
    assert detector.frame == expected and detector.engine.preprocess.frame == expected
    assert detector.engine.preprocess.tiling == Tiling(64, 0.5, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--roi", "1,2,3"], "--roi '1,2,3': give X,Y,W,H"),
        (["--roi", "0,0,0,4"], "--roi 0,0,0,4: x and y start at 0"),
        (["--roi", "50,50,60,60"], "000.png: region 50,50,60,60 (x,y,width,height) reaches out"),
        (["--ignore", "NOWHERE.png"], "NOWHERE.png"),
        (["--ignore", "WIDE"], "000.png: the ignore mask is 90x30 pixels and the image 96x96"),
        (["--align", "GOLDEN"], "--align and --align-on belong together"),
        (["--align-on", "1,2,3,4"], "--align and --align-on belong together"),
        (["--align", "GOLDEN", "--align-on", "90,0,20,20"], "reaches out of the golden sample"),
        (["--search", "4"], "give --align too"),
        (["--overview"], "give --tile too"),
        (["--overlap", "0.4"], "give --tile too"),
        (["--tile", "50"], "tile 50 is not a multiple of 16: the nearest are 48 and 64"),
        (["--tile", "64", "--set", "square=true"], "tiles are for images as they are"),
    ],
)
def test_what_fit_refuses(
    run: Run,
    make_parts: Callable[..., Path],
    tiny_weights: str,
    tmp_path: Path,
    words: list[str],
    says: str,
) -> None:
    parts = make_parts()
    Image.fromarray(corner(30, 90, 9, 9)).save(tmp_path / "wide.png")
    golden = str(parts / "plate" / "train" / "good" / "000.png")
    files = {"GOLDEN": golden, "WIDE": str(tmp_path / "wide.png")}
    code, _, err = run(
        "fit", "anomaly-dino", parts, "-o", tmp_path / "bundle", "--backbone", TINY,
        "--weights", tiny_weights, "--image-size", 96, *(files.get(word, word) for word in words),
    )  # fmt: skip
    assert code == 2 and says in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "bundle").exists()
