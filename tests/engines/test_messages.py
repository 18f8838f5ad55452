"""What travels from whoever enqueues a job to the worker, and what a worker refuses to read."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_tasks import InvalidSettingError, MalformedMessageError, Retry
from fastapi_tasks.engines.messages import Message, RetryByName, read_message

SECRET = "hunter2"


class OverdrawnError(Exception):
    """What goes wrong in this module."""


class FrozenError(OverdrawnError):
    """A kind of it."""


def a_message(**fields: Any) -> Message:
    """Return a message, of which a test says what matters to it."""
    fields = {"name": "charge", "arguments": {"order_id": 1}, "created": 1.5, "due": 2.5} | fields
    return Message(**fields)


def test_a_message_is_read_as_it_was_written() -> None:
    """From text or bytes, whatever the engine stores."""
    retry = RetryByName.of(Retry(on=OverdrawnError))
    message = a_message(retry=retry, timeout=3.0, trace={"traceparent": "00-0-0-00"})

    text = message.model_dump_json()

    assert read_message(text) == read_message(text.encode()) == message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "json_invalid"),
        (SECRET, "json_invalid"),
        ("[]", "model_type"),
        (b"\xff\xfe", "json_invalid"),
        (b"\x80\x04\x95" + SECRET.encode(), "json_invalid"),
        ({"version": 2}, "version: literal_error"),
        ({"name": None}, "name: string_type"),
        ({"arguments": [SECRET]}, "arguments: dict_type"),
        ({"due": -1}, "due: greater_than_equal"),
        ({"due": "Infinity"}, "due: finite_number"),
        ({"timeout": SECRET}, "timeout: float_parsing"),
        ({"retry": {"on": SECRET}}, "retry: tuple_type"),
        ({"trace": {SECRET: 1}}, "trace: string_type"),
        ({SECRET[:3]: SECRET}, "hun: extra_forbidden"),
    ],
)
def test_what_is_no_message_is_refused(text: Any, told: str) -> None:
    """The error says where, and not what was there."""
    if isinstance(text, dict):
        text = json.dumps(a_message().model_dump(mode="json") | text)

    with pytest.raises(MalformedMessageError, match=told) as caught:
        read_message(text)

    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


@given(st.one_of(st.text(), st.binary()))
def test_anything_at_all_is_read_or_refused(text: str | bytes) -> None:
    """A worker lives on, whatever somebody has put into its queue."""
    with pytest.raises(MalformedMessageError):
        read_message(text)


# A retry of one call


def test_a_retry_travels_by_the_names_of_its_errors() -> None:
    """The worker imports nothing that a message names."""
    retry = Retry(
        on=(OverdrawnError, ConnectionError),
        attempts=5,
        wait_initial=timedelta(seconds=1),
        wait_max=60,
        wait_jitter=0,
        wait_exp_base=3,
        timeout=timedelta(minutes=2),
    )

    named = RetryByName.of(retry)
    arrived = RetryByName.model_validate_json(named.model_dump_json()).as_retry()

    assert named.on == (f"{__name__}:OverdrawnError", "builtins:ConnectionError")
    assert (arrived.attempts, arrived.wait_initial, arrived.wait_max) == (5, 1.0, 60.0)
    assert (arrived.wait_jitter, arrived.wait_exp_base, arrived.timeout) == (0.0, 3.0, 120.0)


@pytest.mark.parametrize(
    ("error", "is_retried"),
    [
        (OverdrawnError(), True),
        (FrozenError(), True),
        (ConnectionError(), True),
        (ConnectionResetError(), True),
        (LookupError(), False),
        (type("OverdrawnError", (Exception,), {})(), True),
        (type("OverdrawnError", (Exception,), {"__module__": "elsewhere"})(), False),
    ],
)
def test_an_error_is_told_by_the_names_of_its_classes(error: Exception, is_retried: bool) -> None:
    """A class that was imported twice is one, and one of another module is another."""
    arrived = RetryByName.of(Retry(on=(OverdrawnError, ConnectionError))).as_retry()

    assert callable(arrived.on)
    assert arrived.on(error) is is_retried


def test_a_single_type_and_no_timeout_travel_too() -> None:
    """They are the usual case."""
    arrived = RetryByName.of(Retry(on=OverdrawnError)).as_retry()

    assert arrived.timeout is None
    assert arrived.attempts == Retry(on=OverdrawnError).attempts


def test_a_function_cannot_travel() -> None:
    """So that one knows where to put it instead."""
    with pytest.raises(InvalidSettingError, match=r"@engine\.task\(retry="):
        RetryByName.of(Retry(on=lambda error: True))


@pytest.mark.parametrize("wait", [math.nan, math.inf, -1])
def test_a_message_has_no_moment_that_is_none(wait: float) -> None:
    """An engine would wait for ever."""
    with pytest.raises(ValueError, match="due"):
        a_message(due=wait)
