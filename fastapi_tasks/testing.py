"""What users import in their tests: no sleeps, and no lifespan that has to run.

The package itself never imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager

import anyio.lowlevel
from fastapi import FastAPI

from .app import get_supervisor
from .captured import CapturedTasks, TasksOfMoment
from .config import Duration, in_seconds, is_wait
from .errors import InvalidSettingError, MisusedTestToolError, StillBusyError
from .inline import Inline
from .observer import TaskEvent, describe
from .spawn import current_spawner
from .supervisor import StandIn, Supervisor
from .tasks import Task, settle_unbegun

__all__ = [
    "CapturedTasks",
    "TasksOfMoment",
    "capture_tasks",
    "run_inline",
    "wait_until_idle",
    "wait_until_idle_from_thread",
]


@contextmanager
def capture_tasks(app: FastAPI | Supervisor | None = None) -> Generator[CapturedTasks]:
    """Record what is scheduled, and run nothing of it.

    A plain ``with``, in async tests too. The app's lifespan may run or not. What a request drops,
    since it went wrong for example, does not count as scheduled.

    :param app: the app, the outer one if others are mounted in it; or a supervisor; without
        either, only what is scheduled on the ``tasks`` of what is yielded
    :raises FastAPITasksUninitializedAppError: ``add_tasks`` was not called for the app
    :raises InvalidSettingError: it is neither an app nor a supervisor
    :raises MisusedTestToolError: within another one for the same app
    """
    supervisor = Supervisor() if app is None else _supervisor_of(app)
    captured = CapturedTasks(supervisor)
    try:
        with _standing_in(supervisor, _Capturing(), captured.observe):
            yield captured
    finally:
        for task in captured[:]:
            # Whoever waits for it from now on, would wait for ever.
            settle_unbegun(task)
            task.context = task.request_end = None


@contextmanager
def run_inline(app: FastAPI | Supervisor) -> Generator[CapturedTasks]:
    """Run each task to its end at its moment, and raise what tasks have raised.

    A plain ``with``, in async tests too. The app's lifespan may run or not. Tasks that start now,
    and after the route, run one after the other when the endpoint has returned; those after the
    response before the client has it. No ``delay`` passes, and no wait before a retry.

    When the block is left, the error of a task that has failed is raised, several of them as an
    ``ExceptionGroup``. What an ``on_error`` raises counts too.

    :param app: the app, the outer one if others are mounted in it; or a supervisor
    :raises FastAPITasksUninitializedAppError: ``add_tasks`` was not called for the app
    :raises InvalidSettingError: it is neither an app nor a supervisor
    :raises MisusedTestToolError: within another one for the same app, or tasks still run at the end
    """
    supervisor = _supervisor_of(app)
    inline = Inline(supervisor)
    captured = CapturedTasks(supervisor)

    def observe(event: TaskEvent) -> None:
        captured.observe(event)
        inline.observe(event)

    with _standing_in(supervisor, inline, observe):
        try:
            yield captured
        except BaseException as error:
            for failure in inline.failures:
                if failure is not error:
                    error.add_note(f"A task had failed: {type(failure).__name__}: {failure}")
            inline.close()
            raise
        left = inline.close()
    _raise(inline.failures)
    if left:
        raise MisusedTestToolError(
            f"the test is over, and tasks still run: {describe(left)}",
            instead="await wait_until_idle(app)  # at the end of the block",
        )


async def wait_until_idle(app: FastAPI | Supervisor, timeout: Duration = 5) -> None:  # noqa: ASYNC109
    """Wait until no task is live, error handlers included, and none waits for its moment.

    If the app's tasks do not run, it returns at once.

    :param app: the app, or a supervisor
    :param timeout: seconds or ``timedelta``, 5 s by default
    :raises StillBusyError: there are still some then; the text names them
    :raises MisusedTestToolError: the tasks run in another event loop than the caller
    :raises FastAPITasksUninitializedAppError: ``add_tasks`` was not called for the app
    :raises InvalidSettingError: an argument has a value that it cannot have
    """
    supervisor = _supervisor_of(app)
    seconds = _seconds(timeout)
    if not supervisor.has_loop:
        await anyio.lowlevel.checkpoint()
        return
    if not supervisor.is_here:
        raise MisusedTestToolError(
            "wait_until_idle() was awaited in another event loop than the tasks'",
            instead="wait_until_idle_from_thread(app)  # beside a TestClient",
        )
    if not await supervisor.is_idle_within(seconds):
        raise _still_busy(supervisor, seconds)


def wait_until_idle_from_thread(app: FastAPI | Supervisor, timeout: Duration = 5) -> None:
    """Do what :func:`wait_until_idle` does, in a test that is not async.

    For ``with TestClient(app)``, which runs the app in a thread of its own.

    :param app: the app, or a supervisor
    :param timeout: seconds or ``timedelta``, 5 s by default
    :raises StillBusyError: there are still some then; the text names them
    :raises MisusedTestToolError: the caller runs in the event loop of the tasks
    :raises FastAPITasksUninitializedAppError: ``add_tasks`` was not called for the app
    :raises InvalidSettingError: an argument has a value that it cannot have
    """
    supervisor = _supervisor_of(app)
    seconds = _seconds(timeout)
    if supervisor.is_here and supervisor.has_loop:
        raise MisusedTestToolError(
            "wait_until_idle_from_thread() was called in the event loop of the tasks",
            instead="await wait_until_idle(app)",
        )
    answer: Future[bool] = Future()
    handles: list[object] = []  # asyncio itself does not keep what it runs

    async def wait() -> None:
        answer.set_result(await supervisor.is_idle_within(seconds))

    def begin() -> None:
        spawner = current_spawner()
        name = wait_until_idle_from_thread.__name__
        handles.append(spawner.spawn(wait(), name=name, context=None, over=handles.remove))

    if not supervisor.call_in_loop(begin):
        return  # nothing runs
    try:
        is_idle = answer.result(seconds + _LOOP_TIME)
    except TimeoutError:
        is_idle = False  # the event loop itself does not answer
    if not is_idle:
        raise _still_busy(supervisor, seconds)


_LOOP_TIME = 1.0
"""Seconds that an event loop may take to answer."""


class _Capturing:
    """Stands in for a supervisor, and runs nothing."""

    def begin_request(self) -> None:
        """Do nothing."""

    async def end_request(self, *, shield: bool) -> None:
        """Do nothing."""

    def require_running(self) -> None:
        """Do nothing: nothing has to run."""

    def submit(self, task: Task) -> None:
        """Do nothing: that it was scheduled was told by an event."""

    def expect_waiter(self, task: Task) -> None:
        """Refuse to wait.

        :raises MisusedTestToolError: always
        """
        raise MisusedTestToolError(
            f"{task.name} was awaited within capture_tasks(), where no task ever ends",
            instead="with run_inline(app): ...",
        )

    def over(self, task: Task) -> None:
        """Do nothing: it was started before."""

    async def turn(self) -> None:
        """Do nothing."""

    def turn_from_thread(self) -> None:
        """Do nothing."""


@contextmanager
def _standing_in(
    supervisor: Supervisor, stand_in: StandIn, observe: Callable[[TaskEvent], None]
) -> Generator[None]:
    if supervisor.stand_in is not None:
        raise MisusedTestToolError(
            "capture_tasks() or run_inline() is at work for this app already",
            instead="one of them at a time, in a with block of its own",
        )
    supervisor.replace(stand_in, observe)
    try:
        yield
    finally:
        supervisor.restore()


def _supervisor_of(app: object) -> Supervisor:
    if isinstance(app, Supervisor):
        return app
    if isinstance(app, FastAPI):
        return get_supervisor(app)
    raise InvalidSettingError(
        "app",
        app,
        expected="the FastAPI app that add_tasks was called for, or a Supervisor",
        instead="capture_tasks(app)  # app = FastAPI(); add_tasks(app)",
    )


def _seconds(timeout: Duration) -> float:
    if not is_wait(timeout):
        raise InvalidSettingError(
            "timeout",
            timeout,
            expected="seconds or a timedelta, 0 or more",
            instead="wait_until_idle(app, timeout=5)",
        )
    return in_seconds(timeout)


def _still_busy(supervisor: Supervisor, seconds: float) -> StillBusyError:
    return StillBusyError(describe(supervisor.running), supervisor.waiting_requests, seconds)


def _raise(failures: list[Exception]) -> None:
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ExceptionGroup(f"{len(failures)} failures of tasks", failures)


for _public in (CapturedTasks, TasksOfMoment):
    _public.__module__ = __name__  # whoever meets one in a traceback finds the module to import
