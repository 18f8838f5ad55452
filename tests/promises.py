"""What tests promise for several kinds of the same thing, as a table in the documentation shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import pytest


class Named(Protocol):
    """A kind: a server, an engine."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...


KindType = TypeVar("KindType", bound=Named)
TestFunction = TypeVar("TestFunction", bound=Callable[..., Any])


@dataclass(frozen=True)
class Promise(Generic[KindType]):
    """A row of the table."""

    text: str
    """What is promised."""
    limits: Mapping[KindType, str]
    """Which kinds do not allow it, and why."""
    kinds: Sequence[KindType]
    """For which kinds it means something."""


class Promises(Generic[KindType]):
    """The promises of a module of tests: a decorator.

    :param kinds: all there are
    """

    def __init__(self, kinds: Sequence[KindType]) -> None:
        self._kinds = kinds
        self.rows: dict[str, Promise[KindType]] = {}
        """By the name of the test."""

    def __call__(
        self,
        limits: Mapping[KindType, str] | None = None,
        kinds: Sequence[KindType] | None = None,
    ) -> Callable[[TestFunction], TestFunction]:
        """Run a test on each kind; the first line of its docstring is what is promised.

        :param limits: which kinds do not allow it, and why
        :param kinds: for which kinds it means something; by default for all
        """
        limits = limits or {}
        kinds = self._kinds if kinds is None else kinds

        def parametrize(test: TestFunction) -> TestFunction:
            assert test.__doc__ is not None
            self.rows[test.__name__] = Promise(test.__doc__.splitlines()[0], limits, kinds)
            parameters = []
            for kind in kinds:
                reason = limits.get(kind)
                limit = pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
                marks = [] if reason is None else [limit]
                parameters.append(pytest.param(kind, id=kind.name, marks=marks))
            return pytest.mark.parametrize("kind", parameters)(test)

        return parametrize
