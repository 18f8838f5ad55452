"""Whatever is done to a supervisor, and to tasks of every kind: the promises hold at each step."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .state_machine import LOOPS, Machine

EXAMPLES = int(os.environ.get("FASTAPI_TASKS_EXAMPLES", "0"))
"""How many lives of a supervisor are tried on each loop; by default a few, always the same."""

LIVES = settings(
    max_examples=EXAMPLES or 40,
    stateful_step_count=30,
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_promises_hold_whatever_happens(loop: str) -> None:
    """Each task has one state and one end, what is live is kept, and the drain report adds up."""
    run_state_machine_as_test(lambda: Machine(loop), settings=LIVES)
