"""Draw the picture of INP-Former's page: score maps and prototypes of real solar cells.

    python docs/images/make_inp_picture.py cells docs/images/inp-former.png    (minutes)

`cells` is the folder that make_example.py writes (made if it is missing).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from make_example import typical, write_cells
from PIL import Image, ImageDraw, ImageFont

from anomalyst import Detector, Prediction, load_dataset
from anomalyst.inference import read_item
from anomalyst.overlay import heat_overlay
from anomalyst.predictions import overlay_png
from anomalyst.types import ScoreMap

SIDE, SMALL, GAP, HEAD = 150, 104, 6, 24


def main() -> None:
    folder, path = Path(sys.argv[1]), Path(sys.argv[2])
    if not folder.exists():
        write_cells(folder)
    data = load_dataset(folder)
    options = {"steps": 400, "batch_size": 8}
    detector = Detector(
        "inp-former",
        backbone="dinov2-small-packaged",
        image_size=224,
        options=options,
        seed=1,
    )
    detector.fit(data.train, calibration=0.5)
    draw(detector, typical(detector, data.test, (1, 3)), path)


def draw(detector: Detector, shown: list[Prediction], path: Path) -> None:
    """Draw a row a cell: the image, its heat map, and the image once for each prototype."""
    count = detector.method.options.prototypes
    width = 2 * (SIDE + GAP) + count * (SMALL + GAP) - GAP
    sheet = Image.new("RGB", (width, HEAD + len(shown) * (SIDE + GAP) - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    words = ["image", "score map", *(f"INP {k + 1}" for k in range(count))]
    lefts = [0, SIDE + GAP, *(2 * (SIDE + GAP) + k * (SMALL + GAP) for k in range(count))]
    for word, left in zip(words, lefts, strict=True):
        pen.text((left, 2), word, fill="black", font=font)
    for row, prediction in enumerate(shown):
        top = HEAD + row * (SIDE + GAP)
        picture = Image.open(prediction.image).convert("RGB")
        overlay = Image.open(io.BytesIO(overlay_png(detector, prediction)))
        for left, image in zip(lefts, (picture, overlay), strict=False):
            sheet.paste(image.resize((SIDE, SIDE)), (left, top))
        small = np.asarray(picture.resize((SMALL, SMALL)))
        for left, seen in zip(lefts[2:], attention(detector, prediction), strict=True):
            panel = heat_overlay(small, seen, max(float(seen.max()) / 2, 1e-9), ())
            sheet.paste(Image.fromarray(panel), (left, top + (SIDE - SMALL) // 2))
    sheet.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def attention(detector: Detector, prediction: Prediction) -> list[np.ndarray]:
    item = read_item(prediction.image, prediction.image, detector.engine.preprocess)
    maps = detector.method.attention_maps(detector.engine.features([item]))[0].numpy()
    box = (0.0, 0.0, float(SMALL), float(SMALL))
    return [ScoreMap(values, (SMALL, SMALL), 0.5, box).at(SMALL, SMALL) for values in maps]


if __name__ == "__main__":
    main()
