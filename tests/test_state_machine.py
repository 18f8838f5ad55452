"""Whatever is done to a supervisor, and to tasks of every kind: the promises hold at each step."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fastapi_tasks import Supervisor, Task

from .state_machine import LOOPS, Machine

EXAMPLES = int(os.environ.get("FASTAPI_TASKS_EXAMPLES", "0"))
"""How many lives of a supervisor are tried on each loop; by default a few, always the same ones."""

LIVES = settings(
    max_examples=EXAMPLES or 40,
    stateful_step_count=30,
    deadline=None,
    derandomize=not EXAMPLES,
    # Making a failure short takes longer than a test may: that is for whoever asks for more.
    phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_promises_hold_whatever_happens(loop: str) -> None:
    """Each task has one state and one end, what is live is kept, and the drain report adds up."""
    run_state_machine_as_test(lambda: Machine(loop), settings=LIVES)


class Losing(Supervisor):
    """A supervisor that loses tasks, to see whether anybody notices."""

    def _admit(self, task: Task) -> None:
        if task.config.shielded:
            super()._admit(task)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_promise_that_is_broken_is_noticed(loop: str) -> None:
    """And what the supervisor has left behind is ended."""
    with pytest.raises(AssertionError, match="it is gone before its end"):
        run_state_machine_as_test(lambda: Machine(loop, Losing), settings=LIVES)
