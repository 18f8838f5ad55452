"""The environments of the contenders, one for each, below ``.bench``."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".bench"
CONSTRAINTS = ROOT / "requirements-dev.txt"
PROJECT = ROOT / "pyproject.toml"
PEERS: dict[str, dict[str, Any]] = tomllib.loads(
    (Path(__file__).parent / "peers.toml").read_text(encoding="utf-8")
)
US = "us"
SERVER = ["uvicorn", "uvloop", "httptools"]


class EnvironmentFailedError(Exception):
    """An environment could not be made."""


@dataclass(frozen=True)
class Environment:
    """Where a contender is installed.

    :param name: its name in peers.toml
    """

    name: str
    title: str = field(init=False)
    distribution: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", PEERS[self.name]["title"])
        object.__setattr__(self, "distribution", PEERS[self.name]["distribution"])

    @property
    def python(self) -> str:
        """The interpreter."""
        return str(FOLDER / self.name / "bin" / "python")

    @property
    def module(self) -> str:
        """What is imported."""
        return PEERS[self.name]["module"]

    @property
    def contender(self) -> str:
        """The class that knows how to use it."""
        return PEERS[self.name]["contender"]

    def make(self) -> None:
        """Make the environment, unless it is there and as it should be."""
        packages = [*PEERS[self.name]["packages"], *SERVER]
        pinned = CONSTRAINTS.read_text(encoding="utf-8")
        made_for = "\n".join([platform.python_version(), *packages, pinned])
        if self.name == US:
            made_for += PROJECT.read_text(encoding="utf-8")
        stamp = FOLDER / self.name / "made-for"
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == made_for:
            return
        print(f"Installing {self.title} into .bench/{self.name}", flush=True)
        shutil.rmtree(stamp.parent, ignore_errors=True)
        self._run(sys.executable, "-m", "venv", str(stamp.parent))
        constrained = ["--constraint", str(CONSTRAINTS)]
        build = ["--build-constraint", str(CONSTRAINTS)]
        self._pip("--upgrade", "pip", *constrained)
        try:
            self._pip(*packages, *constrained, *build)
        except EnvironmentFailedError:
            print(f"{self.title} does not go with requirements-dev.txt: without it", flush=True)
            self._pip(*packages)
        stamp.write_text(made_for, encoding="utf-8")

    def start_worker(self) -> Worker:
        """Start the process that measures the contender."""
        command = [self.python, "-P", "-m", "benchmarks.worker", self.contender, self.distribution]
        return Worker(command, self.title)

    def import_time(self) -> float:
        """Return how many milliseconds an import takes, in a fresh process."""
        program = (
            "import fastapi, time; start = time.perf_counter(); "
            f"import {self.module}; print(time.perf_counter() - start)"
        )
        command = [self.python, "-I", "-c", program]
        return 1000 * float(subprocess.check_output(command, text=True))

    def _pip(self, *arguments: str) -> None:
        self._run(self.python, "-m", "pip", "install", "-qq", *arguments)

    def _run(self, *command: str) -> None:
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise EnvironmentFailedError(f"{self.title} could not be installed")


class MeasurementFailedError(Exception):
    """A worker could not measure what it was asked for."""


class Worker:
    """A process that measures a contender beside what it is measured against.

    :param command: what runs it
    :param title: whose it is
    """

    def __init__(self, command: list[str], title: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
        self._title = title
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.hello = self._read()

    def measure(self, group: str, seed: int, scale: float = 1) -> dict[str, float]:
        """Have a group measured once.

        :raises MeasurementFailedError: there is no result
        """
        assert self._process.stdin is not None
        order = {"group": group, "seed": seed, "scale": scale}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise MeasurementFailedError(f"{self._title}, {group}: {answer['error']}")
        return answer["values"]

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MeasurementFailedError(f"{self._title}: the process has ended")
        return json.loads(line)
