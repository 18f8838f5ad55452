"""The demos: that each shows what it promises, and that it would tell if something got lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE = 100.0
DEMO = "scripts/demo.py"
ROW = re.compile(r" +\d+\.\d +(?P<since_signal>\d+\.\d)? +(?P<what>(?:POST )?\S+ +[a-z]+)")


@dataclass(frozen=True)
class Run:
    """What a run of the demo has shown."""

    status: int
    output: str
    errors: str

    @property
    def timelines(self) -> tuple[list[str], list[str]]:
        """What happened to the first order and to the second, in order."""
        rows = [" ".join(row["what"].split()) for row in ROW.finditer(self.output)]
        first, second = (i for i, row in enumerate(rows) if row == "POST /orders sent")
        return rows[first:second], rows[second:]


def run(*command: str, path: Path = ROOT) -> Run:
    """Run a demo.

    :param command: what Python runs
    :param path: where it looks for modules first
    """
    process = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return Run(process.returncode, process.stdout, process.stderr)


@pytest.fixture(scope="module")
def demo() -> Run:
    """Run the demo as ``make demo`` does."""
    return run(DEMO)


def test_the_demo_exits_with_zero_when_the_payment_was_kept(demo: Run) -> None:
    """The verdict is the last thing that it says, and there is no complaint."""
    assert (demo.status, demo.errors) == (0, "")
    assert "The payment is SAFE" in demo.output.splitlines()[-2]


def test_the_first_order_shows_what_starts_when(demo: Run) -> None:
    """Every task starts at its moment, and without a signal each of them finishes."""
    quiet, _ = demo.timelines
    assert [row for row in quiet if row.endswith((" started", " sent"))] == [
        "POST /orders sent",
        "check_fraud started",
        "record_audit started",
        "response sent",
        "take_payment started",
        "send_email started",
    ]
    assert {row for row in quiet if row.endswith(" finished")} == {
        f"{name} finished" for name in ("check_fraud", "record_audit", "take_payment", "send_email")
    }


def test_the_second_order_shows_what_a_sigterm_does(demo: Run) -> None:
    """The email is cancelled, the payment finishes, and only then the app closes and ends."""
    _, disturbed = demo.timelines
    steps = [
        "take_payment started",
        "SIGTERM sent",
        "drain started",
        "send_email cancelled",
        "take_payment finished",
        "drain finished",
        "connections closed",
        "server ended",
    ]
    assert [row for row in disturbed if row in steps] == steps


def test_times_are_given_since_the_request_and_since_the_signal(demo: Run) -> None:
    """From the signal on, and not before, each row has both."""
    rows = list(ROW.finditer(demo.output))
    signal = next(i for i, row in enumerate(rows) if row["what"].startswith("SIGTERM"))
    assert rows[signal]["since_signal"] == "0.0"
    assert [row["since_signal"] is None for row in rows] == [i < signal for i in range(len(rows))]


def test_the_demo_fails_when_the_payment_was_lost() -> None:
    """Without its shield the payment is cancelled, and both the text and the status say so."""
    demo = run(DEMO, "--without-shield")
    _, disturbed = demo.timelines
    assert demo.status == 1
    assert "take_payment cancelled" in disturbed
    assert "take_payment finished" not in disturbed
    assert "The payment is LOST: cancelled" in demo.output.splitlines()[-1]


def test_the_demo_shows_the_servers_log_when_it_does_not_start(tmp_path: Path) -> None:
    """A machine on which nothing can be shown is told from a payment that was lost."""
    (tmp_path / "uvicorn.py").write_text("raise SystemExit('no server today')")
    demo = run(DEMO, path=tmp_path)
    assert demo.status == 2
    assert "no server today" in demo.errors


# make demo-durable


def run_durable(*options: str) -> Run:
    """Run the demo of jobs as ``make demo-durable`` does."""
    pytest.importorskip("dbos")
    return run("-m", "scripts.demo_durable", *options)


CHARGES = [f"charge {number}" for number in range(1, 7)]


def test_every_charge_is_completed_after_a_kill() -> None:
    """Two before it, two that it cut off, and two that waited; each of them with its time."""
    demo = run_durable()
    assert (demo.status, demo.errors) == (0, "")
    verdicts = re.findall(r"^(charge \d): (.*)$", demo.output, re.MULTILINE)
    assert [charge for charge, _ in verdicts] == CHARGES
    before, cut_off, waited = (
        [verdict for _, verdict in verdicts[start : start + 2]] for start in (0, 2, 4)
    )
    assert before == ["completed before the kill"] * 2
    for verdict in cut_off:
        assert re.fullmatch(r"completed \d+\.\d\d s after the restart: .* began anew", verdict)
    for verdict in waited:
        assert re.fullmatch(r"completed \d+\.\d\d s after the restart: it waited", verdict)
    rows = re.findall(r"^ +\d+\.\d\d +(\S.*\S) +(begun|completed)", demo.output, re.MULTILINE)
    rows = [(charge.strip(), what) for charge, what in rows]
    assert Counter(charge for charge, what in rows if what == "completed") == Counter(CHARGES)
    assert Counter(charge for charge, what in rows if what == "begun") == Counter(
        [*CHARGES, "charge 3", "charge 4"]
    )
    assert "Each of the 6 charges was COMPLETED" in demo.output


def test_without_an_engine_charges_are_lost() -> None:
    """What was a task of the process is gone with it, and both the text and the status say so."""
    demo = run_durable("--without-engine")
    assert demo.status == 1
    assert re.findall(r"^(charge \d): LOST$", demo.output, re.MULTILINE) == CHARGES[2:]
    assert demo.output.splitlines()[-1] == "4 of 6 charges are LOST."
