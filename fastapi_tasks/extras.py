"""Extras of this package: what they bring is imported by few modules, and may not be there."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from .errors import MissingPackageError

__all__ = ["extra"]


@contextmanager
def extra(name: str, module: str, /, **packages: str) -> Generator[None, None, None]:
    """Say what to install if an import within the block finds that it is not there.

    Any other failure passes as it is: whoever installed the extra then would be no better off.

    :param name: the extra's
    :param module: the module that needs it
    :param packages: what the extra brings, by what it is imported as
    :raises MissingPackageError: one of them is not installed, or too old
    """
    try:
        yield
    except ImportError as error:
        package = packages.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise MissingPackageError(module, package, extra=name) from error
