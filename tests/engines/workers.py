"""Worker processes, as users start them, that end in every way in which processes end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import Any

from tests.servers import ROOT, Output

from .jobs import Trace, eventually
from .kinds import Kind, Place
from .services import PATIENCE


class Worker:
    """A process that runs the jobs of one engine.

    :param kind: the engine
    :param place: where its jobs are kept
    :param trace: where the jobs note that they have run
    :param concurrency: how many run at once
    :param shutdown_timeout: seconds that it has to end once it was told to
    """

    def __init__(
        self,
        kind: Kind,
        place: Place,
        trace: Trace,
        *,
        concurrency: int = 10,
        shutdown_timeout: float = 20,
    ) -> None:
        command = ["worker", "tests.engines.conformance_worker:engine"]
        command += [f"--concurrency={concurrency}", f"--shutdown-timeout={shutdown_timeout}"]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "fastapi_tasks", *command],
            cwd=ROOT,
            env={
                **os.environ,
                "ENGINE_KIND": kind.name,
                "ENGINE_URL": place.url,
                "ENGINE_SETTINGS": json.dumps(dict(place.settings)),
                "ENGINE_TRACE": str(trace.folder),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._said = Output(self.process.stdout)
        self.log = Output(self.process.stderr)

    @property
    def pid(self) -> int:
        """Which process it is."""
        return self.process.pid

    async def until_ready(self) -> None:
        """Wait until it takes jobs."""
        ready = f"Worker {self.pid} runs the jobs of"
        # It imports a lot, and may be one of many processes that do.
        await eventually(
            lambda: any(ready in line for line in self.log.so_far()),
            3 * PATIENCE,
            lambda: f"{self.log.so_far()}",
        )

    def kill(self) -> None:
        """End it as a power cut does."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def terminate(self) -> None:
        """Tell it to end in good order."""
        self.process.send_signal(signal.SIGTERM)

    async def status(self) -> int:
        """Wait until it has ended, and return its exit status."""
        return await asyncio.to_thread(self.process.wait, PATIENCE)

    def close(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.process.terminate()  # a killed one could not write down what of it was covered
            try:
                self.process.wait(PATIENCE)
            finally:
                self.process.kill()
        self._said.all()
        self.log.all()


@contextmanager
def working(
    kind: Kind, place: Place, trace: Trace, **settings: Any
) -> Generator[Worker, None, None]:
    """Run a worker as long as the block runs, unless it ends before.

    :param settings: what else :class:`Worker` takes
    """
    with closing(Worker(kind, place, trace, **settings)) as worker:
        yield worker
