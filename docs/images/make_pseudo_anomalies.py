"""Draw the picture of the page on pseudo-anomalies: one of each kind, on solar cells.

    python docs/images/make_pseudo_anomalies.py cells docs/images/pseudo-anomalies.png

`cells` is the folder that make_example.py writes (made if it is missing). Nothing is picked by eye:
the first good cells, one seed.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from make_example import write_cells
from PIL import Image, ImageDraw, ImageFont

from anomalyst import load_dataset
from anomalyst.data.images import read_image
from anomalyst.methods.synthesis import (
    contact_sheet,
    cut_paste,
    perlin_texture,
    scar,
    seamless_clone,
)
from anomalyst.methods.textures import Procedural, Shuffled

SIDE, CELL, NAMES, SEED = 224, 150, 120, 0


def main() -> None:
    folder, path = Path(sys.argv[1]), Path(sys.argv[2])
    if not folder.exists():
        write_cells(folder)
    rng = np.random.default_rng(SEED)
    patch, mark, drawn, shuffled, clone, other = map(pixels, load_dataset(folder).train[:6])
    made = {
        "patch": (patch, cut_paste(patch, rng)),
        "scar": (mark, scar(mark, rng)),
        "Perlin,\nprocedural": (
            drawn,
            perlin_texture(drawn, rng, Procedural().draw(drawn, None, rng)),
        ),
        "Perlin,\nshuffled": (
            shuffled,
            perlin_texture(shuffled, rng, Shuffled().draw(shuffled, None, rng)),
        ),
        "NSA": (clone, seamless_clone(clone, other, rng)),
    }
    sheet = contact_sheet(list(made.values()), CELL)
    picture = Image.new("RGB", (NAMES + sheet.width, sheet.height), "white")
    picture.paste(sheet, (NAMES, 0))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for row, name in enumerate(made):
        height = (row + 0.5) * sheet.height / len(made)
        pen.text((12, height), name, fill="black", font=font, anchor="lm")
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    path.write_bytes(file.getvalue())
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def pixels(sample) -> np.ndarray:
    return np.asarray(Image.fromarray(read_image(sample.path)).resize((SIDE, SIDE)))


if __name__ == "__main__":
    main()
