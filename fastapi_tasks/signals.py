"""The signals that stop a worker: the first one asks it to end, the second one ends it."""

from __future__ import annotations

import asyncio
import signal
from types import FrameType

__all__ = ["StopSignals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Waits for SIGTERM or SIGINT, from before there is an event loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self.name = ""
        """The name of the signal, once one has come."""

    def install(self) -> None:
        """Catch the first signal. Until :meth:`wait`, it ends the process with status 0."""
        for number in _SIGNALS:
            signal.signal(number, self._stop)

    def listen(self) -> None:
        """Let the first signal end :meth:`wait` from now on, and not the process.

        In the event loop. A signal that could not end the process counts too.
        """
        self._loop = asyncio.get_running_loop()
        if self.name:
            self._event.set()

    async def wait(self) -> None:
        """Wait for the first signal."""
        await self._event.wait()

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        # Whoever asks twice does not want to wait.
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.name = signal.Signals(number).name
        if self._loop is None:
            raise SystemExit(0)  # which may get lost, in somebody's __del__
        self._loop.call_soon_threadsafe(self._event.set)
