"""Lists of images to judge: files, folders, Parquet lists, and storage behind a URL.

A list holds names only. Whoever judges an image reads it, wherever that is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast

from anomalyst.data.images import IMAGE_SUFFIXES, display_name, list_images, reason
from anomalyst.errors import InputError
from anomalyst.scale import scale_module
from anomalyst.types import Prediction, Sample

if TYPE_CHECKING:
    from anomalyst.inference import ImageSource
    from anomalyst.predictions import Predictor

LIST_SUFFIX = ".parquet"
_T = TypeVar("_T")
_BLOCK = 16  # images fetched together; two blocks are in memory
_URL = re.compile(r"[A-Za-z][\w+.:-]+://")


@dataclass(frozen=True)
class Source:
    """One image of a list: its path or URL, which is its name too, and its product if known."""

    name: str
    category: str | None = None

    @property
    def is_url(self) -> bool:
        """Whether fsspec reads it."""
        return is_url(self.name)


def is_url(place: str) -> bool:
    """Tell a URL such as ``s3://bucket/line3`` from a path."""
    return _URL.match(place) is not None


def list_sources(given: Iterable[str]) -> list[Source]:
    """Return the images that are meant, in the order given; no image is opened.

    Parameters
    ----------
    given
        Each an image, a folder (with the folders inside it), a ``.parquet`` list, or the URL of any
        of these. A path that is none of them stays, so that whoever reads it says so.

    Raises
    ------
    InputError
        A list or URL cannot be read, or has no images.
    """
    return [source for place in given for source in _expand(place)]


def _expand(place: str) -> list[Source]:
    if is_url(place):
        suffix = PurePosixPath(place).suffix.lower()
        if suffix == LIST_SUFFIX:
            return _read_list(place)
        return [Source(place)] if suffix in IMAGE_SUFFIXES else _list_url(place)
    path = Path(place)
    if path.is_dir():
        try:
            return [Source(str(found)) for found in list_images(path, recursive=True)]
        except InputError:
            return [Source(str(path))]
    return _read_list(place) if path.suffix.lower() == LIST_SUFFIX else [Source(str(path))]


# ---- lists --------------------------------------------------------------------------------------


def _read_list(place: str) -> list[Source]:
    """Return the rows of a Parquet file: column ``image`` or the only text, and ``category``."""
    parquet = scale_module("pyarrow.parquet")
    try:
        with _open(place) as file:
            table = parquet.ParquetFile(file)
            column = _image_column(table.schema_arrow, place)
            has_category = "category" in table.schema_arrow.names
            wanted = [column, "category"] if has_category else [column]
            rows = table.read(columns=wanted)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: cannot be read as a Parquet list ({reason(error)})") from error
    names = rows.column(column).to_pylist()
    categories = rows.column("category").to_pylist() if has_category else [None] * len(names)
    if not names:
        raise InputError(f"{place}: the list is empty; give one with a row for each image")
    if None in names:
        raise InputError(f"{place}: row {names.index(None)} names no image in column {column!r}")
    return [
        Source(_as_given(name), category) for name, category in zip(names, categories, strict=True)
    ]


def _image_column(schema: Any, place: str) -> str:
    types = scale_module("pyarrow").types
    texts = [f.name for f in schema if types.is_string(f.type) or types.is_large_string(f.type)]
    others: list[str] = [name for name in texts if name != "category"]
    if "image" in others:
        return "image"
    if len(others) != 1:
        known = ", ".join(schema.names)
        raise InputError(f"{place}: has columns {known}; name the one with the images `image`")
    return others[0]


def _as_given(name: str) -> str:
    return name if is_url(name) else str(Path(name))


def _open(place: str) -> Any:
    if not is_url(place):
        return open(place, "rb")
    system, path = _file_system(place)
    return _ask(place, "opened", lambda: system.open(path, "rb"))


# ---- URLs ---------------------------------------------------------------------------------------


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    fsspec = scale_module("fsspec")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or "a package"
        raise InputError(f"{url}: this needs {missing} ({error}): pip install {missing}") from None
    except ValueError as error:
        raise InputError(f"{url}: {reason(error)}; see fsspec for the kinds of URL") from None
    return system, path


def _ask(url: str, what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # each storage has errors of its own, all of them the place's fault
        raise InputError(f"{url}: cannot be {what} ({reason(error)})") from error


def _list_url(url: str) -> list[Source]:
    """Return the images under a URL, sorted by path, hidden ones left out as in a folder."""
    system, path = _file_system(url)
    files = _ask(url, "listed", lambda: system.find(path))
    below = len(PurePosixPath(path).parts)
    found = sorted((PurePosixPath(file) for file in files), key=lambda file: file.parts)
    shown = [f for f in found if not any(name.startswith(".") for name in f.parts[below:])]
    images = [file for file in shown if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise InputError(
            f"{url}: no images there; files that end in {', '.join(sorted(IMAGE_SUFFIXES))} count"
        )
    return [Source(system.unstrip_protocol(str(image))) for image in images]


class _Content(bytes):
    """The bytes of a file that goes by a name: a sample is called by its path as text."""

    name: str

    def __new__(cls, content: bytes, name: str) -> _Content:
        made = super().__new__(cls, content)
        made.name = name
        return made

    def __str__(self) -> str:
        return self.name


def _fetch(sources: Sequence[Source]) -> list[bytes | str]:
    """Return the content of each, or why there is none; storage that can reads them at once."""
    found: list[bytes | str] = []
    for system, group in groupby(
        (_locate(source.name) for source in sources), key=lambda at: at[0]
    ):
        paths = [path for _, path in group]
        if isinstance(system, str):
            found += [system] * len(paths)
            continue
        contents = system.cat_ranges(paths, None, None, on_error="return")
        found += [reason(c) if isinstance(c, Exception) else bytes(c) for c in contents]
    return found


def _locate(url: str) -> tuple[Any, str]:
    try:
        return _file_system(url)
    except InputError as error:
        return str(error).removeprefix(f"{url}: "), url


# ---- to predictions -----------------------------------------------------------------------------


def judge(
    detector: Predictor,
    images: Iterable[ImageSource | Source],
    category: str | None = None,
    keep_pixels: bool = False,
) -> Iterator[Prediction]:
    """Return ``detector.predict`` over images of which some may lie behind a URL."""
    failed: dict[int, str] = {}
    sources = _to_image_sources(images, failed)
    return _with_failures(
        detector.predict(sources, category=category, keep_pixels=keep_pixels), failed
    )


def _with_failures(found: Iterable[Prediction], failed: dict[int, str]) -> Iterator[Prediction]:
    for number, prediction in enumerate(found):
        why = failed.pop(number, None)
        if why is None:
            yield prediction
        else:
            error = f"{display_name(prediction.image)}: {why}"
            yield replace(prediction, error=error)


def _to_image_sources(
    images: Iterable[ImageSource | Source], failed: dict[int, str]
) -> Iterator[ImageSource]:
    """Yield what a detector reads; of a URL that failed an empty file, and the reason apart."""
    for remote, group in groupby(enumerate(images), key=lambda pair: _is_remote(pair[1])):
        if remote:
            yield from _fetched(cast("Iterator[tuple[int, Source]]", group), failed)
            continue
        for _, image in group:
            yield Sample(Path(image.name), image.category) if isinstance(image, Source) else image


def _is_remote(image: ImageSource | Source) -> bool:
    return isinstance(image, Source) and image.is_url


def _fetched(numbered: Iterator[tuple[int, Source]], failed: dict[int, str]) -> Iterator[Sample]:
    """Yield each with its content, one block fetched while the one before is judged."""
    with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
        blocks = iter(lambda: list(islice(numbered, _BLOCK)), [])
        coming = _ahead((block, pool.submit(_fetch, [s for _, s in block])) for block in blocks)
        for block, contents in coming:
            for (number, source), content in zip(block, contents.result(), strict=True):
                if isinstance(content, str):
                    failed[number] = content
                known = _Content(content if isinstance(content, bytes) else b"", source.name)
                yield Sample(cast(Path, known), source.category)


def _ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yield each item once the one behind it has been started."""
    waiting: list[_T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting
