"""Checks of what engines are made with, so that what is wrong is told where it is written."""

from __future__ import annotations

from fastapi_tasks.config import Duration, in_seconds, is_count, is_wait
from fastapi_tasks.errors import InvalidSettingError

__all__ = ["check_count", "checked_seconds"]


def check_count(setting: str, value: object, *, least: int = 1, instead: str) -> None:
    """Refuse what is no whole number, or too small a one.

    :param instead: what to write in its place
    :raises InvalidSettingError: it is refused
    """
    if not is_count(value, least=least):
        expected = f"a whole number, {least} or more"
        raise InvalidSettingError(setting, value, expected=expected, instead=instead)


def checked_seconds(setting: str, value: Duration, *, least: int = 0, instead: str) -> float:
    """Return a time in seconds, which is more than 0.

    :param least: how many seconds it has at least, if that is said
    :param instead: what to write in its place
    :raises InvalidSettingError: it is no time, or too short a one
    """
    if not is_wait(value) or not value or in_seconds(value) < least:
        limit = f"{least} or more" if least else "more than 0"
        expected = f"seconds or a timedelta, {limit}"
        raise InvalidSettingError(setting, value, expected=expected, instead=instead)
    return in_seconds(value)
