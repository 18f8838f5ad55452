"""``make bench``: that its worker measures what it says, and refuses what has not run.

What comes out for whom is no test's affair: a machine that is busy has other times.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .servers import PATIENCE, unmeasured

ROOT = Path(__file__).parents[1]
SIDES = {
    "requests": {
        *("background", "background_again", "raw", "raw_turn"),
        *("now", "after_route", "after_response"),
    },
    "flood": {"raw", "flood", "shielded", "configured"},
    "drain": {"raw", "drain"},
}
IDLE = """
import sys
from benchmarks import worker
from benchmarks.contenders.with_tasks import Ours

class Idle(Ours):
    def endpoint(self, how, function, count):
        async def endpoint() -> int:
            return count
        return endpoint

for group in sys.argv[1:]:
    print(worker.answer(Idle(), {"group": group, "seed": 1, "scale": 0.001}))
"""
"""A contender that schedules nothing, and so would be the fastest."""


def run(*arguments: str, lines: str = "") -> list[str]:
    """Run Python where the benchmark's modules are found, and return what it prints.

    :param lines: what it reads
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-P", *arguments],
        env={**unmeasured(), "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])},
        input=lines,
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return done.stdout.splitlines()


def test_the_worker_measures_every_side_of_a_group() -> None:
    """Each has taken some time."""
    orders = [json.dumps({"group": group, "seed": 1, "scale": 0.002}) for group in SIDES]
    command = ["-m", "benchmarks.worker", "with_tasks:Ours", "fastapi-tasks"]
    hello, *answers = map(json.loads, run(*command, lines="\n".join(orders)))

    assert hello["versions"].keys() >= {"fastapi", "fastapi-tasks"}
    measured: dict[str, dict[str, Any]] = dict(
        zip(SIDES, (answer["values"] for answer in answers), strict=True)
    )
    assert {group: set(values) for group, values in measured.items()} == SIDES
    for values in measured.values():
        assert all(math.isfinite(value) and value > 0 for value in values.values()), values


def test_the_worker_refuses_a_figure_whose_tasks_did_not_run() -> None:
    """Whoever does nothing is done at once."""
    refusals = run("-c", IDLE, *SIDES)

    assert len(refusals) == len(SIDES)
    for refusal in refusals:
        assert re.fullmatch(r"{'error': 'TasksDidNotRunError: \d of \d+ tasks have run'}", refusal)
