"""A clock for what waits for minutes: no time passes on it."""

from __future__ import annotations

import pytest

from tests.clocks import FakeClockLoop

on_fake_clock = pytest.mark.parametrize(
    "anyio_backend",
    [pytest.param(("asyncio", {"loop_factory": FakeClockLoop}), id="asyncio-fake-clock")],
)
