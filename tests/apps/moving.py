"""The app before and after the first diff of ``docs/migrating.rst``, from BackgroundTasks to ours.

Its texts are sent when there is a line on standard input.
"""

from __future__ import annotations

import sys

import anyio.to_thread

from tests import diffs


class Gateway:
    """Says what it does."""

    async def send(self, text: str) -> None:
        """Send a text, when it may."""
        print(f"sending {text}", flush=True)
        try:
            await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        except BaseException:
            print("not sent", flush=True)
            raise
        print("sent", flush=True)


_before, _after = diffs.sides(diffs.diffs_of("migrating")[0])
before = diffs.app_of(_before, gateway=Gateway())
after = diffs.app_of(_after, gateway=Gateway())
forgotten = diffs.app_of(_after.replace("grace=10, ", ""), gateway=Gateway())
