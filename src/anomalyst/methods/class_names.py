"""From a category's name to the words that CLIP reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from anomalyst.errors import InputError

_log = logging.getLogger(__name__)

# What data sets call a product, and what it is called in the papers' sentences.
_SPOKEN = {
    "macaroni1": "macaroni",
    "macaroni2": "macaroni",
    "pcb1": "printed circuit board",
    "pcb2": "printed circuit board",
    "pcb3": "printed circuit board",
    "pcb4": "printed circuit board",
    "chewinggum": "chewing gum",
}


def _parse(given: Any) -> Any:
    """Read ``01:metal plate,02:wood`` as the command line gives it."""
    if not isinstance(given, str):
        return given
    pairs = [part.partition(":") for part in given.split(",") if part.strip()]
    if any(not colon for _, colon, _ in pairs):
        raise ValueError("write it as CATEGORY:WORDS,CATEGORY:WORDS")
    return {category.strip(): words.strip() for category, _, words in pairs}


def _require_words(names: dict[str, str]) -> dict[str, str]:
    for category, words in names.items():
        if not _is_spoken(words):
            raise ValueError(f"the words for {category!r} have no letter; give such as metal plate")
    return names


def _is_spoken(words: str) -> bool:
    return any(letter.isalpha() for letter in words)


Names = Annotated[dict[str, str], BeforeValidator(_parse), AfterValidator(_require_words)]
"""Words for categories whose own name says nothing, such as ``{"01": "metal plate"}``."""


def class_name(category: str | None, names: Mapping[str, str], method: str) -> str:
    """Return the words for a category: those given, those of the papers, or its name as words.

    Raises
    ------
    InputError
        There is no category, or nothing in its name to be read as a word.
    """
    if category is None:
        raise InputError(f"{method} needs a class name: say which product it is (--category NAME)")
    words = names.get(category) or _SPOKEN.get(category) or category.replace("_", " ").strip()
    mend = f"call it by words, such as 'metal plate', or fit with --set names='{category}:WORDS'"
    if not _is_spoken(words):
        raise InputError(f"category {category!r} is no class name that {method} could read: {mend}")
    if not words.isascii():
        _log.warning("class name %r: CLIP reads English; %s", words, mend)
    return words
