"""Work on several processes and machines: Ray, and lists of images too long for a command line."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from anomalyst.errors import InputError


def scale_module(name: str) -> Any:
    """Return a module that comes with the extra ``scale``.

    Raises
    ------
    InputError
        It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise InputError(f'this needs {missing}: pip install "anomalyst[scale]"') from None
