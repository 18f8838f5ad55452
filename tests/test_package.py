"""The package as a whole: what it exports, and what its wheel contains."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import fastapi_tasks
from fastapi_tasks import Supervisor, UninitializedReason, errors

ROOT = Path(__file__).parent.parent
PUBLIC = {name: getattr(fastapi_tasks, name) for name in fastapi_tasks.__all__}


def test_the_names_are_sorted_and_documented() -> None:
    """Whoever asks help() for one of them gets an answer."""
    assert fastapi_tasks.__all__ == sorted(fastapi_tasks.__all__)
    aliases = {"Moment", "RunIf", "Tasks", "TaskErrorHandler"}
    assert [n for n in PUBLIC if n not in aliases and not inspect.getdoc(PUBLIC[n])] == []


def test_the_names_report_the_module_that_they_are_imported_from() -> None:
    """A traceback shows the line to write, not the file that something happens to be in."""
    shown = {n: PUBLIC[n].__module__ for n in PUBLIC if inspect.isclass(PUBLIC[n])}
    assert set(shown.values()) == {"fastapi_tasks"}


def test_the_errors_are_in_a_module_of_their_own_too() -> None:
    """``except errors.X`` is how some prefer to write it."""
    of_package = {n for n, v in PUBLIC.items() if inspect.isclass(v) and issubclass(v, Exception)}
    of_package -= {"RequestBoundArgumentWarning"}  # nothing is to be caught
    of_module = {
        n for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, Exception)
    }
    assert of_package == of_module
    for name in of_module:
        assert issubclass(getattr(errors, name), errors.FastAPITasksError)
        assert name in (errors.__doc__ or "")


def test_the_errors_can_be_sent_to_another_process() -> None:
    """A pool's worker hands back their text and what they tell by attributes."""
    task = Supervisor().schedule(int)
    made = [
        errors.FastAPITasksError("something"),
        errors.FastAPITasksUninitializedAppError(UninitializedReason.STOPPED),
        errors.AddTasksError("it is too late", instead="add_tasks(app)"),
        errors.EngineStateError("it is not started", instead="add_tasks(app, engines=[jobs])"),
        errors.EngineUnavailableError("jobs", "no answer", instead="Look whether it runs"),
        errors.InvalidArgumentsError("charge", "'order_id' is missing"),
        errors.InvalidSettingError("grace", -1, expected="a number", instead="grace=1"),
        errors.InvalidTaskError("int", instead="schedule(func)"),
        errors.JobCancelledError("5c1f"),
        errors.JobFailedError("5c1f", "ValueError", "no"),
        errors.MalformedMessageError("name: missing"),
        errors.MissingPackageError("observers.x", "x", extra="x"),
        errors.MisusedTestToolError("nothing runs", instead="run_inline(app)"),
        errors.NoCurrentTaskError(),
        errors.NoResultError("5c1f", "it is not kept"),
        errors.StillBusyError("deliver", 2, 5),
        errors.SupervisorStateError("start() was called"),
        errors.TaskCancelledError(task),
        errors.TaskFailedError(task, SystemExit()),
        errors.TaskNotFinishedError(task),
        errors.TaskTimeoutError(task, 30),
        errors.TooManyTasksError(1000),
        errors.UnregisteredFunctionError("charge", "jobs"),
        errors.UnsupportedFastAPIError("stack"),
        errors.WorkerLostError(3),
        errors.WrongEventLoopError(task),
    ]
    kinds = (kind for kind in vars(errors).values() if inspect.isclass(kind))
    assert {type(error) for error in made} == {k for k in kinds if issubclass(k, Exception)}
    for error in made:
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_the_import_brings_no_event_loop_library_along() -> None:
    """An app on asyncio does not pay for trio, nor for what only its tests use."""
    code = (
        "import fastapi, sys; before = set(sys.modules); import fastapi_tasks; "
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"trio", "uvloop", "stamina", "sniffio"} & set(run.stdout.split())


def test_the_wheel_contains_the_package_and_nothing_else(tmp_path: Path) -> None:
    """No test, no benchmark and no example lands in somebody's site-packages."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    package = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "fastapi_tasks").rglob("*")
        if p.is_file() and p.parent.name != "__pycache__"
    }
    assert {n for n in names if ".dist-info/" not in n} == package
    assert "fastapi_tasks/py.typed" in names
