"""Draw the picture of NAGL's page: solar cells before and after one defect was taught.

    python docs/images/make_nagl_picture.py cells docs/images/nagl.png    (a minute)

`cells` is the folder that make_example.py writes (made if it is missing). Nothing is picked by eye:
4 good cells as normal references; the taught cell is the one that only just got past (of the
defective cells under the 95 % quantile of the good ones, that with the highest score); of the
others are shown those whose score rose most, and the good cell that rose most.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from make_example import write_cells
from PIL import Image, ImageDraw, ImageFont

from anomalyst import Detector, Prediction, Sample, load_dataset
from anomalyst.generalist import load_generalist
from anomalyst.overlay import heat_overlay

SIDE, GAP, HEAD = 150, 6, 24
NORMAL, GOOD, SHOWN, QUANTILE = 4, 100, 3, 0.95
MARKED = ((0.04, 0.0, 0.24, 0.16), (0.0, 0.82, 0.2, 1.0))  # left, top, right, bottom in shares


def main() -> None:
    folder, path = Path(sys.argv[1]), Path(sys.argv[2])
    if not folder.exists():
        write_cells(folder)
    data = load_dataset(folder)
    good = list(data.train[NORMAL : NORMAL + GOOD])
    defective = [sample for sample in data.test if sample.label == 1]
    detector = load_generalist()
    detector.enroll("cell", data.train[:NORMAL])
    level = np.quantile(scores(detector, good), QUANTILE)
    rated = zip(scores(detector, defective), defective, strict=True)
    taught = max(((x, s) for x, s in rated if x < level), key=lambda pair: pair[0])[1]
    others = [sample for sample in defective if sample is not taught]
    before = list(detector.predict([*good, *others], category="cell"))
    detector.enroll("cell", (), [(taught, drawn_mask(taught.path))])
    after = list(detector.predict([*good, *others], category="cell"))
    for name, found in (("before", before), ("after", after)):
        level = np.quantile([p.score for p in found[: len(good)]], QUANTILE)
        caught = sum(p.score > level for p in found[len(good) :])
        print(f"{name}: {caught} of {len(others)} over the level of {len(good)} good cells")
    rise = np.array([b.score / a.score for a, b in zip(before, after, strict=True)])
    bad = len(good) + np.argsort(-rise[len(good) :])[:SHOWN]
    shown = [int(np.argmax(rise[: len(good)])), *map(int, bad)]
    draw(detector, taught.path, [(before[k], after[k]) for k in shown], path)


def drawn_mask(path: Path) -> np.ndarray:
    """The two streaked corners of the taught cell, as a person would mark them."""
    width, height = Image.open(path).size
    mask = np.zeros((height, width), dtype=np.uint8)
    for left, top, right, bottom in MARKED:
        rows, columns = (
            slice(int(top * height), int(bottom * height)),
            slice(int(left * width), int(right * width)),
        )
        mask[rows, columns] = 255
    return mask


def scores(detector: Detector, samples: list[Sample]) -> list[float]:
    return [p.score or 0.0 for p in detector.predict(samples, category="cell")]


def draw(
    detector: Detector, taught: Path, pairs: list[tuple[Prediction, Prediction]], path: Path
) -> None:
    """Draw a column a cell: the image, its map before, and after, all in one scale."""
    columns = len(pairs) + 1
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, HEAD + 3 * (SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    top = max(float(after.map.max()) for _, after in pairs)
    words = ["taught", "good", *["defective"] * (columns - 2)]
    maps = detector.method._defects["cell"][0][1].numpy().astype(np.uint8) * 255
    for column, word in enumerate(words):
        left = column * (SIDE + GAP)
        pen.text((left, 2), word, fill="black", font=font)
        image = Image.open(taught if column == 0 else pairs[column - 1][0].image).convert("RGB")
        small = np.asarray(image.resize((SIDE, SIDE)))
        panels = [Image.fromarray(small)]
        if column == 0:
            panels.append(Image.fromarray(maps).resize((SIDE, SIDE), Image.Resampling.NEAREST))
        else:
            for found in pairs[column - 1]:
                heat = np.asarray(Image.fromarray(found.map).resize((SIDE, SIDE)))
                panels.append(Image.fromarray(heat_overlay(small, heat, top / 2, ())))
        for row, panel in enumerate(panels):
            sheet.paste(panel.convert("RGB"), (left, HEAD + row * (SIDE + GAP)))
    file = io.BytesIO()
    sheet.save(file, "png", optimize=True)
    path.write_bytes(file.getvalue())
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
