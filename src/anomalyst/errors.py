"""The one error that means "your input or data": the command line answers it in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """The user's input or data is at fault: one line that names the culprit and the mend.

    The command line prints it without a traceback and exits with code 2.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for a name that does not exist, with the nearest that does.

    >>> str(unknown("category", "botle", ["bottle", "screw"]))
    "unknown category 'botle': did you mean 'bottle'? Known: bottle, screw"
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return InputError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}")
