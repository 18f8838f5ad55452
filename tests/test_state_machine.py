"""Whatever is done to a supervisor, and to tasks of every kind: the promises hold at each step."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fastapi_tasks import Supervisor, Task

from .state_machine import LOOPS, QUIET, Machine, Work

EXAMPLES = int(os.environ.get("FASTAPI_TASKS_EXAMPLES", "0"))
"""How many lives of a supervisor are tried on each loop; by default a few, always the same ones."""

LIVES = settings(
    max_examples=EXAMPLES or 30,
    stateful_step_count=30,
    deadline=None,
    derandomize=not EXAMPLES,
    # Making a failure short takes longer than a test may: that is for whoever asks for more.
    phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
    suppress_health_check=list(HealthCheck),
)


GATE = Work(waits="gate")
IN_TIME = Work(waits="gate", timeout=1.3)


def now(work: Work, *, turns: int = QUIET, in_thread: bool = False) -> tuple[str, dict[str, Any]]:
    """Schedule a task."""
    return "schedule", {"work": work, "turns": turns, "in_thread": in_thread}


def step(name: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """Take another step."""
    return name, arguments


# What chance seldom comes to. Tasks are counted from the latest one, which is 0.
BY_HAND = [
    pytest.param(
        [
            now(replace(IN_TIME, sync=True, limiter=0)),
            now(replace(GATE, limiter=0)),
            step("be_quiet", seconds=2.8),
            step("let_go", number=1, turns=0),
            step("be_quiet", seconds=0.0),
            step("let_go", number=0, turns=0),
            step("collect"),
        ],
        id="a-thread-out-of-time-keeps-its-place",
    ),
    pytest.param(
        [
            now(replace(IN_TIME, attempts=2, retry_on="two", on_error="ends")),
            now(replace(IN_TIME, on_cancel="cleans up", limiter=1)),
            now(replace(IN_TIME, on_cancel="ignores")),
            step("wait", number=2),
            *[step("be_quiet", seconds=0.9)] * 6,
        ],
        id="out-of-time",
    ),
    pytest.param(
        [
            now(Work(endings=("errs",), attempts=2)),
            now(Work(endings=("fails", "errs", "fails"), attempts=3)),
            now(Work(endings=("fails",), attempts=3, retry_on="asks", on_error="waits")),
            step("be_quiet", seconds=2.8),
            step("let_go", number=0, turns=0),
        ],
        id="not-worth-another-attempt",
    ),
    pytest.param(
        [
            *[now(replace(GATE, sync=True))] * 3,
            step("be_quiet", seconds=0.9),
            step("cancel", number=0, turns=0, in_thread=True),
            step("cancel", number=1, turns=0, in_thread=False),
            step("be_quiet", seconds=0.9),
            step("let_go", number=1, turns=0),
        ],
        id="more-than-there-are-threads",
    ),
    pytest.param(
        [
            now(Work(waits="ever")),
            step("collect"),
            step("release", place="response", number=0, failed=False, turns=0),
            step(
                "schedule_for_later",
                place="response",
                number=0,
                work=Work(waits="ever", shield=True),
                turns=0,
                in_thread=False,
            ),
            step("collect"),
        ],
        id="nobody-else-refers-to-it",
    ),
    pytest.param(
        [
            step("drain_for_long", on_cancel="ignores", turns=0),
            now(replace(GATE, shield=True), turns=0, in_thread=True),
            now(replace(GATE, shield=True)),
            now(replace(GATE, shield=True, delay=0.7)),
            step("let_go", number=1, turns=0),
            step("advance", seconds=3.4),
            now(replace(GATE, shield=True)),
            now(replace(GATE, shield=True), in_thread=True),
            step("advance", seconds=6.3),
            step("drain_or_start", turns=0),
            now(GATE),
        ],
        id="late-in-a-drain",
    ),
]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("steps", BY_HAND)
def test_the_promises_hold_where_chance_seldom_comes(
    steps: list[tuple[str, dict[str, Any]]], loop: str
) -> None:
    """Some lives by hand."""
    machine = Machine(loop)
    machine.begin(grace=0.0, more=6.0, starts=True, order=0.0)
    for name, arguments in steps:
        getattr(machine, name)(**arguments)
    machine.teardown()


@pytest.mark.parametrize("loop", LOOPS)
def test_the_promises_hold_whatever_happens(loop: str) -> None:
    """Each task has one state and one end, what is live is kept, and the drain report adds up."""
    run_state_machine_as_test(lambda: Machine(loop), settings=LIVES)


class Losing(Supervisor):
    """A supervisor that loses tasks, to see whether anybody notices."""

    def submit(self, task: Task) -> None:
        _ = super().submit(task) if task.config.shielded else None


@pytest.mark.parametrize("loop", LOOPS)
def test_a_promise_that_is_broken_is_noticed(loop: str) -> None:
    """And what the supervisor has left behind is ended."""
    with pytest.raises(AssertionError, match="it is gone before its end"):
        run_state_machine_as_test(lambda: Machine(loop, Losing), settings=LIVES)
