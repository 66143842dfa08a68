"""Write the example of the documentation: a folder of solar cells, and the README's picture.

    python docs/images/make_example.py cells                          the folder alone
    python docs/images/make_example.py cells docs/images/cells.png    and the picture (minutes)

The images come with PyPI's `elpv-dataset` (CC BY-NC-SA 4.0), which the extra [demo] installs.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from anomalyst import Detector, Prediction, Sample, load_dataset
from anomalyst.demo import solar_cells
from anomalyst.predictions import overlay_png

GOOD, DEFECTIVE = 250, 60
SIDE, GAP, CAPTION = 230, 10, 46


def main() -> None:
    folder = Path(sys.argv[1])
    write_cells(folder)
    if len(sys.argv) > 2:
        draw(*judge(folder), Path(sys.argv[2]))


def write_cells(folder: Path) -> None:
    """Copy monocrystalline cells from all over the list: `good` and `defective`.

    Neighbouring files show the same solar module, and `fit` holds out the last by name: numbers in
    shuffled order see to it that both halves show all modules.
    """
    data, others = solar_cells(shots=1)
    cells = [s for s in (*data.train, *data.test, *others) if s.category == "mono"]
    for label, (name, count) in enumerate([("good", GOOD), ("defective", DEFECTIVE)]):
        found = sorted(s.path for s in cells if s.label == label)
        chosen = [found[k * len(found) // count] for k in range(count)]
        Random(0).shuffle(chosen)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k, path in enumerate(chosen):
            shutil.copy(path, folder / name / f"{k:03d}-{path.name}")


def judge(folder: Path) -> tuple[Detector, list[Prediction]]:
    """Fit as the README does; return one typical good cell and three that were called NG."""
    data = load_dataset(folder)
    detector = Detector("anomaly-dino", backbone="dinov2-small-packaged")
    detector.fit(data.train, calibration=0.5)
    return detector, typical(detector, data.test, (1, 2, 3))


def typical(
    detector: Detector, test: Sequence[Sample], quarters: Sequence[int]
) -> list[Prediction]:
    """Return a good cell and some that were called NG; nothing is picked by eye.

    The good one has the median score of the good test images, the others lie at so many quarters
    of the defective ones that are NG, by score.
    """
    found = list(zip(test, detector.predict(test), strict=True))
    print(Counter((sample.defect, prediction.verdict) for sample, prediction in found))
    good = by_score(found, "good")
    caught = [p for p in by_score(found, "defective") if p.verdict == "ng"]
    chosen = [good[len(good) // 2], *(caught[len(caught) * k // 4] for k in quarters)]
    return list(detector.predict([p.image for p in chosen], keep_pixels=True))


def by_score(found: Sequence[tuple[Sample, Prediction]], defect: str) -> list[Prediction]:
    return sorted(
        (prediction for sample, prediction in found if sample.defect == defect),
        key=lambda prediction: prediction.score or 0.0,
    )


def draw(detector: Detector, shown: Sequence[Prediction], path: Path) -> None:
    """Draw a column a cell: the image, its heat map, its verdict."""
    size = (len(shown) * (SIDE + GAP) - GAP, 2 * SIDE + GAP + CAPTION)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for k, prediction in enumerate(shown):
        left = k * (SIDE + GAP)
        overlay = Image.open(io.BytesIO(overlay_png(detector, prediction)))
        pictures = (Image.open(prediction.image).convert("RGB"), overlay)
        for row, picture in enumerate(pictures):
            sheet.paste(picture.resize((SIDE, SIDE)), (left, row * (SIDE + GAP)))
        kind = Path(prediction.image).parent.name
        words = f"{kind} cell: {(prediction.verdict or '').upper()}"
        numbers = f"score {prediction.score:.3f}, p = {prediction.p_value:.2f}"
        pen.text((left, 2 * SIDE + GAP + 4), f"{words}\n{numbers}", fill="black", font=font)
    sheet.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
