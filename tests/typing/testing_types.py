"""What type checkers make of ``fastapi_tasks.testing``; never run, checked by ``make lint``.

Lines with ``type: ignore`` must be errors: the checkers complain about ignores without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_type

from fastapi import FastAPI

from fastapi_tasks import BoundTasks, Supervisor, Task
from fastapi_tasks.testing import (
    CapturedTasks,
    capture_tasks,
    run_inline,
    wait_until_idle,
    wait_until_idle_from_thread,
)


class Parcel:
    pass


async def weigh(parcel: Parcel, *, precise: bool = False) -> float:
    return 1.0 if precise else 0.9


def label(parcel: Parcel, copies: int) -> str:
    return "x" * copies


def what_was_scheduled_is_typed_like_its_call(app: FastAPI, parcel: Parcel) -> None:
    with capture_tasks(app) as captured:
        assert_type(captured, CapturedTasks)
    assert_type(captured.assert_scheduled(weigh, parcel, precise=True).result(), float)
    assert_type(captured.after_response.assert_scheduled(label, parcel, copies=2).result(), str)
    assert_type(captured.of(label)[0].result(), str)
    assert_type(captured.now.of(weigh)[0].result(), float)
    assert_type(captured[0], Task[..., Any])
    assert_type(captured.dropped, Sequence[Task[..., Any]])
    captured.assert_not_scheduled(weigh)


def a_wrong_argument_is_an_error(captured: CapturedTasks, parcel: Parcel) -> None:
    captured.assert_scheduled(weigh)  # type: ignore[call-overload]
    captured.assert_scheduled(weigh, 17)  # type: ignore[call-overload]
    captured.assert_scheduled(weigh, parcel, precise="very")  # type: ignore[arg-type]
    captured.after_route.assert_scheduled(label, parcel)  # type: ignore[call-overload]
    captured.assert_not_scheduled(17)  # type: ignore[arg-type]
    captured.of(17)  # type: ignore[call-overload]


async def the_tools_take_apps_and_supervisors(app: FastAPI, supervisor: Supervisor) -> None:
    with capture_tasks() as captured:
        tasks: BoundTasks = captured.tasks
    with capture_tasks(supervisor), run_inline(supervisor) as ran:
        assert_type(ran, CapturedTasks)
    assert_type(tasks.schedule(int).result(), int)
    await wait_until_idle(app, timeout=1)
    wait_until_idle_from_thread(supervisor)
    run_inline()  # type: ignore[call-arg]
    wait_until_idle_from_thread("app")  # type: ignore[arg-type]
