"""The command `anomalyst pseudo-anomalies`."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anomalyst.cli_options import Categories, Data, Layout, Seed
from anomalyst.console import say
from anomalyst.errors import InputError
from anomalyst.files import make_folder, replace_file

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from anomalyst.types import ByteArray


def pseudo_anomalies(
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture, a .png.")],
    recipe: Annotated[str, typer.Option(help="hybrid, cutpaste, perlin or nsa.")] = "hybrid",
    textures: Annotated[
        str, typer.Option(help="procedural, shuffled, others, or a folder of textures.")
    ] = "procedural",
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Keep to the object, where one is found.")
    ] = False,
    count: Annotated[int, typer.Option(min=1, max=200, help="Images to show.")] = 8,
    image_size: Annotated[
        int, typer.Option(min=16, max=2048, help="Short side of the images in pixels.")
    ] = 224,
    category: Categories = None,
    layout: Layout = None,
    seed: Seed = 0,
) -> None:
    """Draw a sheet of the pseudo-anomalies that a training would see, to look at them first."""
    import numpy as np

    from anomalyst.data.layouts import load_dataset
    from anomalyst.methods.synthesis import Synthesizer, contact_sheet
    from anomalyst.methods.textures import by_category, find_textures

    if output.suffix.lower() != ".png":
        raise InputError(f"{output}: the sheet is a PNG file; let its name end in .png")
    samples = load_dataset(data, layout=layout, categories=category).train
    images = by_category(samples)
    synthesizer = Synthesizer(recipe, find_textures(textures, images), foreground)
    make_folder(output.parent)
    rng, rows = np.random.default_rng(seed), []
    for sample in (samples[k * len(samples) // count] for k in range(count)):
        alike = images[sample.category or ""]
        other = alike[(alike.index(sample.path) + 1) % len(alike)]
        source = _resized(other, image_size) if recipe == "nsa" and len(alike) > 1 else None
        image = _resized(sample.path, image_size)
        rows.append((image, synthesizer(image, rng, sample.category, source)))
    _write(contact_sheet(rows, image_size), output)
    empty = sum(not made.mask.any() for _, made in rows)
    print(f"{output}: {count} pseudo-anomalies, {empty} came out empty")
    if empty == count:
        say("nothing shows on any image: try another --recipe, or leave --foreground out")


def _write(sheet: Picture, output: Path) -> None:
    file = BytesIO()
    sheet.save(file, "png")
    try:
        replace_file(output, file.getvalue())
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); name another") from None


def _resized(path: Path, short: int) -> ByteArray:
    """Return an image's pixels with that short side, in its own proportions."""
    import numpy as np
    from PIL import Image

    from anomalyst.data.images import read_image

    picture = Image.fromarray(read_image(path))
    scale = short / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
