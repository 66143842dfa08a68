"""Reading pixels: every usual kind of file, and one clear line for every file that is bad."""

from __future__ import annotations

import builtins
import errno
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from anomalyst.data import images
from anomalyst.data.images import list_images, read_file, read_image, read_mask
from anomalyst.errors import InputError

RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(NOISE).resize((90, 60), Image.Resampling.BICUBIC))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_pixels_stored(
    tmp_path: Path, kind: str, options: dict[str, object]
) -> None:
    data = encode(Image.fromarray(NOISE), kind, **options)
    path = tmp_path / "wrong suffix.jpg"  # the content decides
    path.write_bytes(data)
    for source in (path, str(path), data):
        pixels = read_image(source)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, NOISE)


def test_jpeg_is_close() -> None:
    pixels = read_image(encode(Image.fromarray(SMOOTH), "JPEG", quality=95, subsampling=0))
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 3


ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,  # not in the standard
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(NOISE), kind, exif=exif, **options)
    np.testing.assert_array_equal(read_image(data), ORIENTED[orientation](NOISE))


def test_exif_that_cannot_be_parsed_counts_as_none() -> None:
    data = encode(Image.fromarray(NOISE), "PNG", exif=b"Exif\0\0no TIFF header here")
    np.testing.assert_array_equal(read_image(data), NOISE)


def test_grey_and_one_bit() -> None:
    grey = NOISE[:, :, 0]
    np.testing.assert_array_equal(
        read_image(encode(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, axis=2)
    )
    bits = grey > 127
    pixels = read_image(encode(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(pixels, np.stack([bits * np.uint8(255)] * 3, axis=2))


def test_palette() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    data = encode(palette, "PNG")
    np.testing.assert_array_equal(read_image(data), [[[10, 20, 30], [200, 100, 50]]])
    transparent = encode(palette, "PNG", transparency=1)
    np.testing.assert_array_equal(read_image(transparent), [[[10, 20, 30], [0, 0, 0]]])
    half = encode(palette, "PNG", transparency=bytes([255, 51]))
    np.testing.assert_array_equal(read_image(half), [[[10, 20, 30], [40, 20, 10]]])


def test_alpha_is_composited_over_black() -> None:
    alpha = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    expected = np.rint(NOISE * (alpha[:, :, None] / 255)).astype(np.uint8)
    rgba = np.dstack([NOISE, alpha])
    np.testing.assert_array_equal(read_image(encode(Image.fromarray(rgba), "PNG")), expected)
    np.testing.assert_array_equal(read_image(rgba), expected)
    grey = Image.merge("LA", [Image.fromarray(NOISE[:, :, 0]), Image.fromarray(alpha)])
    np.testing.assert_array_equal(
        read_image(encode(grey, "PNG")), np.stack([expected[:, :, 0]] * 3, axis=2)
    )


def test_transparent_colour_becomes_black() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    data = encode(image, "PNG", transparency=(4, 5, 6))
    np.testing.assert_array_equal(read_image(data), [[[1, 2, 3], [0, 0, 0]]])


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])  # Pillow writes Adobe's inverted CMYK JPEG
def test_cmyk(kind: str) -> None:
    for ink, level in {(0, 0, 0, 0): 255, (0, 0, 0, 255): 0, (0, 0, 0, 128): 127}.items():
        data = encode(Image.new("CMYK", (16, 16), ink), kind)
        assert np.abs(read_image(data).astype(int) - level).max() <= 2
    cyan = read_image(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), kind))
    assert np.abs(cyan.astype(int) - (0, 255, 255)).max() <= 3


DEEP = np.array([[0, 128, 129, 257, 4095, 32768, 65535 - 129, 65535]], dtype=np.uint16)
EIGHT = np.array([[0, 0, 1, 1, 16, 128, 254, 255]], dtype=np.uint8)  # v / 257, rounded


def big_endian_tiff() -> bytes:
    """The values of DEEP as TIFF in the byte order of Motorola, written by hand."""
    tags = [(256, 4, DEEP.size), (257, 4, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 122), (277, 3, 1), (278, 4, 1), (279, 4, DEEP.nbytes)]
    fields = b"".join(
        struct.pack(">HHI", tag, kind, 1)
        + (struct.pack(">I", value) if kind == 4 else struct.pack(">HH", value, 0))
        for tag, kind, value in tags
    )
    head = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + fields + struct.pack(">I", 0)
    return head + DEEP.astype(">u2").tobytes()


def test_sixteen_bit_grey_is_scaled_by_a_fixed_factor() -> None:
    expected = np.stack([EIGHT] * 3, axis=2)
    sources = [
        encode(Image.fromarray(DEEP), "PNG"),
        encode(Image.fromarray(DEEP), "TIFF"),
        big_endian_tiff(),
        DEEP,
        DEEP.astype(">u2"),
        Image.fromarray(DEEP.astype(np.int32)),
    ]
    for source in sources:
        np.testing.assert_array_equal(read_image(source), expected)


def test_float_grey_must_lie_between_0_and_1() -> None:
    grey = np.array([[0, 0.5, 1, 0.25]], dtype=np.float32)
    pixels = read_image(encode(Image.fromarray(grey), "TIFF"))
    np.testing.assert_array_equal(pixels[:, :, 1], [[0, 128, 255, 64]])


@pytest.mark.parametrize(
    "values", [[0.0, 255.0], [-0.01, 0.5], [0.0, float("nan")], [float("inf"), 0.0]]
)
def test_other_floats_are_refused(values: list[float]) -> None:
    data = encode(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    with pytest.raises(InputError, match=r"^image: pixel values .* must lie in \[0, 1\]; save"):
        read_image(data)


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_sixteen_bits_are_refused(value: int) -> None:
    data = encode(Image.fromarray(np.array([[0, value]], dtype=np.int32)), "TIFF")
    with pytest.raises(InputError, match=r"^image: pixel values .* must lie in \[0, 65535\]; "):
        read_image(data)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
    ],
)
def test_the_first_of_several_frames(kind: str, options: dict[str, object]) -> None:
    first, second = Image.fromarray(NOISE), Image.fromarray(255 - NOISE)
    data = encode(first, kind, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(read_image(data), NOISE)


def test_one_pixel() -> None:
    assert read_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


def test_arrays() -> None:
    pixels = read_image(NOISE)
    np.testing.assert_array_equal(pixels, NOISE)
    assert not np.shares_memory(pixels, NOISE)
    flipped = read_image(NOISE[:, ::-1])
    assert flipped.flags.c_contiguous
    np.testing.assert_array_equal(flipped, NOISE[:, ::-1])
    np.testing.assert_array_equal(read_image(NOISE[:, :, 0])[:, :, 2], NOISE[:, :, 0])
    np.testing.assert_array_equal(read_image(NOISE.astype(np.uint16) * 257), NOISE)
    np.testing.assert_array_equal(read_image(Image.fromarray(NOISE)), NOISE)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4), dtype=bool),
        np.zeros((4, 4), dtype=np.int64),
        np.zeros((4, 4), dtype=np.uint32),
        np.zeros((3, 5, 5), dtype=np.uint8),
        np.zeros((4, 4, 1), dtype=np.uint8),
        np.zeros((4,), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InputError, match="cannot read an image from an array"):
        read_image(array)


def test_a_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(NOISE), "PNG"))
    opened: list[object] = []
    real = builtins.open

    def counting(file: object, *rest: object, **options: object) -> object:
        opened.append(file)
        return real(file, *rest, **options)

    monkeypatch.setattr(builtins, "open", counting)
    read_image(path)
    assert opened == [path]


def refused(source: object) -> str:
    with pytest.raises(InputError) as caught:
        read_image(source)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"just words, no picture", "not a PNG, JPEG"),
        (b"BMW is a car", "damaged or unsupported"),
        (b"IIII", "damaged or unsupported"),
        (b"RIFF\0\0\0\0WAVEfmt ", "damaged or unsupported"),
        (b"GIF89a\x01\0\x01\0\0\0\0;", "not a PNG, JPEG"),
        (png_header(0, 10), "damaged or unsupported"),
        (png_header(40, 40), "damaged or unsupported"),
        (png_header(20_000, 20_000), "400 megapixels"),
    ],
)
def test_bad_content(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "named.png"
    path.write_bytes(content)
    message = refused(path)
    assert says in message
    assert str(path) in message


def test_bad_paths(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "missing.png")
    assert "is a folder" in refused(tmp_path)
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "gone.png")
    assert "link to the missing" in refused(link)
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    assert str(loop) in refused(loop)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert "no regular file" in refused(pipe)
    assert "null" in refused("a\0b.png")
    assert refused(tmp_path / "two\nlines.png").startswith("'")
    assert "NoneType" in refused(None)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.png"
    path.write_bytes(encode(Image.fromarray(NOISE), "PNG"))

    def locked(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(builtins, "open", locked)
    assert refused(path) == f"{path}: Permission denied"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged TIFF tags
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
    ],
)
def test_a_truncated_file_is_never_filled_up(kind: str, options: dict[str, object]) -> None:
    data = encode(Image.fromarray(SMOOTH), kind, **options)
    whole = read_image(data)
    bad = 0
    for length in range(1, len(data), max(1, len(data) // 60)):
        try:
            pixels = read_image(data[:length])
        except InputError:
            bad += 1
        else:  # only what follows the pixels is missing
            np.testing.assert_array_equal(pixels, whole)
    assert bad > 50
    assert "damaged or unsupported" in refused(data[: len(data) // 2])


def test_pillow_filling_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "LOAD_TRUNCATED_IMAGES" in refused(encode(Image.fromarray(NOISE), "PNG"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_damaged_bytes_raise_nothing_else(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind == "BMP" else {"exif": exif}
    data = encode(Image.fromarray(SMOOTH), kind, **options)
    rng = np.random.default_rng(3)
    bad = 0
    for _ in range(100):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 300), 3):
            damaged[place] = rng.integers(256)
        try:
            read_image(bytes(damaged))
        except InputError:
            bad += 1
    assert bad > 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_the_own_limit_holds_and_pillow_does_not_warn(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 12  # Pillow's own, untouched
    data = encode(Image.fromarray(SMOOTH), kind)  # 5400 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(data).shape == (60, 90, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 5399)
    assert "90x60" in refused(data)
    monkeypatch.setattr(images, "MAX_PIXELS", 5400)
    assert read_image(data).shape == (60, 90, 3)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    assert "20000x20000 is 400 megapixels" in refused(png_header(20_000, 20_000))
    exif = Image.Exif()
    exif[0x0112] = 1
    webp = bytearray(encode(Image.new("RGBA", (8, 8)), "WEBP", lossless=True, exif=exif))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16_000 - 1).to_bytes(3, "little") * 2  # the canvas in the header
    assert "image" in refused(bytes(webp))


@pytest.mark.slow
def test_a_hundred_megapixels() -> None:
    for kind in ("JPEG", "TIFF"):
        data = encode(Image.new("RGB", (10_000, 10_000), (9, 9, 9)), kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels = read_image(data)
        assert pixels.shape == (10_000, 10_000, 3)
        assert (pixels[::999, ::999] == 9).all()


@pytest.fixture
def defect() -> np.ndarray:
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, 10:13] = True
    return mask


def test_masks_count_what_is_above_zero(tmp_path: Path, defect: np.ndarray) -> None:
    red = np.zeros((20, 30, 3), dtype=np.uint8)
    red[defect, 0] = 1
    palette = Image.fromarray(defect.astype(np.uint8))
    palette.putpalette([0, 0, 0, 128, 0, 0])
    stroke = np.zeros((20, 30, 4), dtype=np.uint8)
    stroke[defect] = (255, 255, 255, 255)
    stored = [
        Image.fromarray(defect),
        Image.fromarray(defect.astype(np.uint8)),
        Image.fromarray(defect * np.uint8(255)),
        Image.fromarray(defect.astype(np.uint16)),
        Image.fromarray(red),
        palette,
        Image.fromarray(stroke),
    ]
    for number, image in enumerate(stored):
        path = tmp_path / f"{number}.png"
        image.save(path)
        mask = read_mask(path, (20, 30))
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, defect)


def test_a_mask_of_another_size(tmp_path: Path, defect: np.ndarray) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(defect).save(path)
    with pytest.raises(InputError) as caught:
        read_mask(path, (30, 20), tmp_path / "image.png")
    for part in ("30x20", "20x30", str(path), str(tmp_path / "image.png")):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        read_mask(tmp_path / "none.png", (20, 30))


def test_list_images(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.tiff", "notes.txt", ".hidden.png", "sub/d.webp", ".x/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.bmp").symlink_to(tmp_path / "gone.bmp")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)

    def names(recursive: bool) -> list[str]:
        return [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path, recursive)]

    assert names(False) == ["a.jpg", "b.PNG", "broken.bmp", "c.tiff"]
    assert names(True) == ["a.jpg", "b.PNG", "broken.bmp", "c.tiff", "sub/d.webp"]
    assert list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    with pytest.raises(InputError, match="no images in this folder"):
        list_images(tmp_path / "folder.png")
    with pytest.raises(InputError, match="no such file or folder"):
        list_images(tmp_path / "nothing")


def test_a_files_bytes_are_read_whole_or_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    large = bytes(range(256)) * 5000
    path.write_bytes(large)
    assert read_file(path) == large
    with pytest.raises(InputError, match="No such file"):
        read_file(tmp_path / "gone")
    with pytest.raises(InputError, match="is a folder"):
        read_file(tmp_path)
