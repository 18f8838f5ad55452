"""Whatever is done to a supervisor, in whichever order: the promises hold after every turn."""

from __future__ import annotations

import pytest

from fastapi_tasks import Supervisor, Task

from . import preemptions
from .interleavings import LOOPS, Plan, Step, Work, main, make_plan, run, shrink

PLANS = 75  # on each loop, in each run of the suite; scripts/interleavings has the time for more

# What has failed once. A seed's plan changes with the generator; these do not.
FAILED_ONCE = [
    pytest.param(
        Plan(
            0,
            0.0,
            None,
            (
                Step("start"),
                Step("schedule", ("now", 0, Work(shielded=True)), 5),
                Step("schedule", ("now", 0, Work(shielded=True))),
                Step("drain", (), 1),
                Step("interrupt_drain"),
            ),
        ),
        id="interrupted-before-a-task-began",
    ),
    pytest.param(
        Plan(
            1,
            0.0,
            None,
            (Step("start"), Step("schedule", ("now", 0, Work())), Step("cancel", (0,))),
        ),
        id="cancelled-just-before-the-drain",
    ),
    pytest.param(
        Plan(
            2,
            0.0,
            25.0,
            (
                Step("start"),
                Step("schedule", ("now", 0, Work(ending="exits", on_error="fails"))),
                Step("finish", (0,), 3),
            ),
        ),
        id="exits-with-a-handler-that-is-not-for-it",
    ),
]
on_every_loop = pytest.mark.parametrize("loop", LOOPS)


class Losing(Supervisor):
    """A supervisor that loses tasks, to see whether anybody notices."""

    def submit(self, task: Task) -> None:
        if task.config.shielded or not self.is_running:
            super().submit(task)


@on_every_loop
def test_the_promises_hold_in_any_order(loop: str) -> None:
    """States go forward, nothing is lost or told twice, and the report adds up."""
    plans = map(make_plan, range(PLANS))

    error = next((shrink(plan, loop) for plan in plans if run(plan, loop) is not None), None)

    assert error is None, str(error)


@on_every_loop
@pytest.mark.parametrize("plan", FAILED_ONCE)
def test_what_failed_once_does_not_fail_again(plan: Plan, loop: str) -> None:
    """With each of these, a promise was broken."""
    error = run(plan, loop)

    assert error is None


@on_every_loop
def test_a_plan_that_fails_does_so_each_time_and_is_cut_short(loop: str) -> None:
    """Nothing is left to chance, so what is reported is short and can be seen again."""
    seed = next(seed for seed in range(PLANS) if run(make_plan(seed), loop, Losing) is not None)
    plan = make_plan(seed)

    errors = {str(run(plan, loop, Losing)) for _ in range(2)}
    shortest = str(shrink(plan, loop, Losing))

    assert len(errors) == 1
    assert f"scripts/interleavings --loop {loop} --seed {seed}" in shortest
    assert "(  # 2 steps" in shortest


@on_every_loop
def test_what_a_plan_makes_the_supervisor_raise_is_reported(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From tasks of the plan as well."""

    async def fail(self: Supervisor) -> None:
        raise LookupError("no drain")

    monkeypatch.setattr(Supervisor, "drain", fail)

    error = run(Plan(0, 0.0, None, (Step("start"),)), loop)

    assert "LookupError('no drain')" in str(error)


def test_the_script_says_how_much_it_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plans and steps, and in orders of lines."""
    monkeypatch.setattr(preemptions, "_MATRIX", [("new", "none", ["schedule"], ["start"])])

    status = main(["--seconds", "0.6"])

    seed, plans, on_asyncio, on_trio = capsys.readouterr().out.splitlines()
    assert status == 0
    assert seed.startswith("From seed ")
    assert int(plans.split()[0]) >= len(LOOPS)
    assert "orders of a thread and the loop on asyncio, in 2 scenarios" in on_asyncio
    assert "orders of a thread and the loop on trio, in 2 scenarios" in on_trio


def test_the_script_shows_what_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And exits with 1, so that a job of a continuous integration fails."""
    monkeypatch.setattr(Supervisor, "submit", lambda self, task: None)

    statuses = {main(["--seed", str(seed), "--loop", "trio"]) for seed in range(5)}

    assert 1 in statuses
    assert "again: scripts/interleavings --loop trio --seed" in capsys.readouterr().out
