"""The command that runs an engine's jobs in a process of its own: ``fastapi-tasks worker``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

import pytest

from fastapi_tasks.__main__ import main
from tests.servers import PATIENCE, ROOT, Output, unmeasured

SIGNALS = [signal.SIGTERM, signal.SIGINT]
HELD_UP = """
try:
    signal.raise_signal(signal.SIGTERM)
except SystemExit:
    from tests.apps.working import starting as engine
"""
COMMAND = (sys.executable, "-W", "error", "-m", "fastapi_tasks", "worker")


class Worker:
    """A worker in a process of its own.

    :param process: the process
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.stdin = process.stdin
        self.said = Output(process.stdout)
        self.log = Output(process.stderr)

    def status(self) -> int:
        """Wait until it ends, and return its exit status."""
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.wait(PATIENCE)
        self.stdin.close()
        self.said.all()
        self.log.all()


@contextmanager
def worker(
    engine: str, *options: str, jobs: str = "", environment: Mapping[str, str] = os.environ
) -> Generator[Worker]:
    """Run a worker as long as the block runs.

    :param engine: which engine of ``tests.apps.working``
    :param jobs: which jobs there are, by the names of their functions
    """
    process = subprocess.Popen(
        [*COMMAND, f"tests.apps.working:{engine}", *options],
        cwd=ROOT,
        env={**environment, "JOBS": jobs},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running = Worker(process)
    try:
        yield running
    finally:
        running.close()


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a worker that does not start, and return how it has ended.

    :param folder: where there are more modules
    """
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder or "")},
    )


Refused = Callable[..., str]
"""Runs the command in this process, and returns what it says when it has refused to start."""


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Generator[Refused]:
    """The command, without the seconds that another process takes to import everything."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    handlers = [signal.getsignal(number) for number in SIGNALS]

    def refuse(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fastapi-tasks", "worker", *arguments])
        try:
            status = main()
        except SystemExit as error:  # argparse's
            status = cast(int, error.code)
        assert status == 2
        return capsys.readouterr().err

    yield refuse
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


# The end


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_jobs_end(number: signal.Signals) -> None:
    """The worker waits for those that run, and ends well: nothing was lost."""
    with worker("engine", jobs="patient") as running:
        running.said.wait_for("patient")
        running.process.send_signal(number)
        running.log.wait_for(f"{number.name}: no more jobs, and 1 to end")
        running.stdin.write("go on\n")
        running.stdin.flush()

        assert running.status() == 0
        assert running.said.all() == ["opened", "patient", "patient is done", "closed"]
        running.log.wait_for(f"Worker {running.process.pid} ends, and nothing was cut off")


@pytest.mark.parametrize("job", ["endless_job", "brittle"])
def test_a_job_that_takes_too_long_is_cut_off(job: str) -> None:
    """In time for the deadline, and the exit status and the log say so."""
    with worker("engine", "--shutdown-timeout", "1", jobs=job) as running:
        running.said.wait_for(job.partition("_")[0])
        begun = time.monotonic()
        running.process.terminate()

        assert running.status() == 1
        assert time.monotonic() - begun < 10
        assert running.said.all()[-1] == "closed"
        running.log.wait_for(f"cancelling {job}")
        running.log.wait_for("cut off: .*; jobs that are to run again elsewhere: 1")


def test_what_does_not_end_does_not_keep_the_worker() -> None:
    """A thread cannot be cancelled; its job runs again elsewhere."""
    with worker("engine", "--shutdown-timeout", "1", jobs="stuck") as running:
        running.said.wait_for("stuck")
        running.process.terminate()

        assert running.status() == 1
        assert running.said.all()[-1] == "closed"
        running.log.wait_for(r"cut off: stuck \(\w+\); jobs that are to run again elsewhere: 1")
        running.log.wait_for("CRITICAL .*has not ended in time")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_it_at_once(number: signal.Signals) -> None:
    """Whoever asks twice does not want to wait."""
    # A killed process could not write down what of it was covered.
    with worker("engine", jobs="patient", environment=unmeasured()) as running:
        running.said.wait_for("patient")
        running.process.terminate()
        running.log.wait_for("no more jobs")
        running.process.send_signal(number)

        assert running.status() == -number


# The beginning


def test_a_signal_before_the_engine_is_there_ends_the_start() -> None:
    """Nothing has begun, so nothing is wrong."""
    with worker("starting") as running:
        running.said.wait_for("opening")
        running.process.terminate()

        assert running.status() == 0
        running.log.wait_for("SIGTERM: the worker had not started yet")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("signal.raise_signal(signal.SIGTERM)", ""),
        (HELD_UP, "SIGTERM: the worker had not started yet"),
    ],
)
def test_so_does_one_while_modules_are_imported(tmp_path: Path, code: str, told: str) -> None:
    """Also if somebody's code holds it up, on its way."""
    (tmp_path / "slow_shop.py").write_text(f"import signal\n{code}\n")

    ended = run("slow_shop:engine", folder=tmp_path)

    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert told in ended.stderr


def test_an_engine_is_found_in_the_current_folder(tmp_path: Path) -> None:
    """As servers find an app, also by the installed command."""
    (tmp_path / "shop.py").write_text("class jobs:\n    engine = 42\n")
    code = "import sys; from fastapi_tasks.__main__ import main; sys.exit(main())"

    ended = subprocess.run(
        [sys.executable, "-c", code, "worker", "shop:jobs.engine"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**unmeasured(), "PYTHONPATH": str(ROOT)},
    )

    assert 'an engine at "shop:jobs.engine"' in ended.stderr
    assert ended.returncode == 2


def test_it_is_installed_as_a_command() -> None:
    """By the name that its errors have."""
    (command,) = entry_points(group="console_scripts", name="fastapi-tasks")

    assert command.value == "fastapi_tasks.__main__:main"


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("tests.apps.working", 'as "package.module:engine"; got "tests.apps.working"'),
        ("tests/apps/working.py:engine", 'as "package.module:engine"'),
        (":engine", 'as "package.module:engine"'),
        ("tests.apps.workin:engine", 'no "tests.apps.workin" in '),
        ("test.shop:engine", 'no "test.shop" in '),
        ("shop:engine", "PYTHONPATH"),
        ("tests.apps.working:engin", "tests.apps.working has no 'engin'"),
        ("tests.apps.working:number", "got int"),
        ("tests.apps.working:MemoryEngine", "got the class MemoryEngine"),
        ("tests.apps.working:unused", "no function is registered with MemoryEngine"),
        ("tests.apps.working:unreachable", "nobody remembers. Remind somebody"),
    ],
)
def test_an_engine_that_cannot_be_had_is_told_in_a_line(
    refused: Refused, place: str, told: str
) -> None:
    """What came, what was expected, and what to write; no traceback of ours."""
    (line,) = refused(place).splitlines()

    assert line.startswith("fastapi-tasks worker: error: ")
    assert told in line


def test_the_exit_status_tells_that_it_did_not_start() -> None:
    """As it does for every command that is used wrongly."""
    ended = run("tests.apps.working:unreachable")

    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("fastapi-tasks worker: error: memory: nobody")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'"),
        ("raise LookupError('no key')", "LookupError: no key"),
    ],
)
def test_a_module_that_fails_tells_where(
    refused: Refused, tmp_path: Path, code: str, told: str
) -> None:
    """It is the user's own code, and only a traceback says where."""
    (tmp_path / "broken_shop.py").write_text(f"{code}\n")
    sys.path.append(str(tmp_path))

    said = refused("broken_shop:engine")

    assert "error: the import of broken_shop raised:" in said
    assert 'broken_shop.py", line 1' in said
    assert told in said


def test_so_does_what_opens_resources(refused: Refused) -> None:
    """At the start of the engine."""
    said = refused("tests.apps.working:failing")

    assert 'error: the start of MemoryEngine("memory://") raised:' in said
    assert "LookupError: no key for the safe" in said


# Options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--concurrency", "0"], "a whole number, 1 or more, got '0'"),
        (["--concurrency", "many"], "a whole number, 1 or more, got 'many'"),
        (["--shutdown-timeout", "0"], "seconds, more than 0, got '0'"),
        (["--shutdown-timeout", "inf"], "seconds, more than 0, got 'inf'"),
        (["--shutdown-timeout", "soon"], "seconds, more than 0, got 'soon'"),
        (["--log-level", "loud"], "invalid choice: 'loud'"),
        (["--log-format", "xml"], "invalid choice: 'xml'"),
        (
            ["--observer", "tests.apps.working"],
            'where the observer is, as "package.module:observer',
        ),
        (["--observer", "tests.apps.working:number"], "observers=42: expected functions"),
    ],
)
def test_an_option_has_to_make_sense(refused: Refused, options: list[str], told: str) -> None:
    """Told as the engine's place is."""
    said = refused("tests.apps.working:engine", *options)

    assert told in said
    assert "Traceback" not in said


def test_the_engine_keeps_its_concurrency_unless_another_one_is_asked_for() -> None:
    """It was made with one."""
    for options, expected in ((["--concurrency", "3"], 3), ([], 10)):
        with worker("engine", *options) as running:
            running.log.wait_for(
                rf'Worker \d+ runs the jobs of MemoryEngine\("memory://"\), {expected} at once'
            )
            running.process.terminate()
            assert running.status() == 0


def test_observers_are_told_of_the_jobs() -> None:
    """Each one that was asked for."""
    observer = ("--observer", "tests.apps.working:observe")
    with worker("engine", *observer, *observer, jobs="quick") as running:
        running.said.wait_for("finished quick", times=2)
        running.process.terminate()
        assert running.status() == 0


def test_the_log_can_be_read_by_machines() -> None:
    """A line of JSON for each record, with the task's name, id and attempt, and its error."""
    with worker("engine", "--log-format", "json", "--log-level", "info", jobs="bad") as running:
        line = json.loads(running.log.wait_for("{.*exception.*}")[0])
        running.process.terminate()
        assert running.status() == 0
        first, *_ = map(json.loads, running.log.all())

    assert first.keys() == {"time", "level", "logger", "message"}
    assert datetime.fromisoformat(first["time"]).tzinfo is UTC
    assert first["level"] == "info"
    assert line.keys() == {
        *("time", "level", "logger", "message", "task_name", "task_id", "task_attempt"),
        "exception",
    }
    assert (line["level"], line["logger"]) == ("error", "fastapi_tasks")
    assert (line["task_name"], line["task_attempt"]) == ("bad", 1)
    assert line["message"] == f"Task bad ({line['task_id']}) failed in attempt 1"
    assert line["exception"].endswith("LookupError: nothing there")


@pytest.mark.parametrize("has_uvloop", [True, False])
def test_it_runs_on_uvloop_where_that_is_installed(tmp_path: Path, has_uvloop: bool) -> None:
    """As servers do."""
    environment = dict(os.environ)
    if not has_uvloop:
        (tmp_path / "uvloop.py").write_text("raise ImportError\n")
        environment["PYTHONPATH"] = str(tmp_path)
    with worker("engine", jobs="quick", environment=environment) as running:
        running.said.wait_for(f"ran quick on {'uvloop' if has_uvloop else 'asyncio'}")
        running.process.terminate()
        assert running.status() == 0
