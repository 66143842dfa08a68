"""Draw the picture of OneNIP's page: what the reconstruction and the refiner see on solar cells.

    python docs/images/make_onenip_picture.py cells docs/images/onenip.png    (minutes)

`cells` is the folder that make_example.py writes (made if it is missing).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from make_example import typical, write_cells
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from anomalyst import Detector, Prediction, load_dataset
from anomalyst.inference import read_item
from anomalyst.methods.onenip import OneNip
from anomalyst.overlay import heat_overlay

SIDE, GAP, HEAD, STEPS = 150, 6, 24, 400


def main() -> None:
    folder, path = Path(sys.argv[1]), Path(sys.argv[2])
    if not folder.exists():
        write_cells(folder)
    data = load_dataset(folder)
    options = {**OneNip.presets["fast"]["options"], "steps": STEPS}
    detector = Detector(
        "onenip", backbone="dinov2-small-packaged", image_size=224, options=options, seed=1
    )
    detector.fit(data.train, calibration=0.5)
    draw(detector, typical(detector, data.test, (1, 3)), path)


def draw(detector: Detector, shown: list[Prediction], path: Path) -> None:
    """Draw a row a cell: the image and its three maps, each kind in one scale."""
    columns = ["image", "reconstruction", "refiner", "score map"]
    width = len(columns) * (SIDE + GAP) - GAP
    sheet = Image.new("RGB", (width, HEAD + len(shown) * (SIDE + GAP) - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for place, word in enumerate(columns):
        pen.text((place * (SIDE + GAP), 2), word, fill="black", font=font)
    rows = [maps(detector, prediction) for prediction in shown]
    units = [max(float(row[k].max()) for row in rows) / 2 for k in range(3)]
    for number, (prediction, row) in enumerate(zip(shown, rows, strict=True)):
        top = HEAD + number * (SIDE + GAP)
        picture = Image.open(prediction.image).convert("RGB").resize((SIDE, SIDE))
        sheet.paste(picture, (0, top))
        for k, values in enumerate(row):
            resized = Image.fromarray(values.numpy()).resize((SIDE, SIDE))
            panel = heat_overlay(np.asarray(picture), np.asarray(resized), units[k], ())
            sheet.paste(Image.fromarray(panel), ((k + 1) * (SIDE + GAP), top))
    sheet.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


@torch.inference_mode()
def maps(detector: Detector, prediction: Prediction) -> list[Tensor]:
    """Return S_rec, S_ref and S of one image, at the network's input size."""
    method = detector.method
    assert isinstance(method, OneNip)
    item = read_item(prediction.image, prediction.image, detector.engine.preprocess)
    (seen,) = detector.engine.features([item])
    (prompts,) = (v for k, v in method.tensors().items() if k.startswith("prompts."))
    tokens = method.network.encode(prompts)
    reconstruction, refined = method.network.maps(seen, tokens)
    assert refined is not None
    return [reconstruction[0], refined[0], method.network.judge(seen, tokens)[0]]


if __name__ == "__main__":
    main()
