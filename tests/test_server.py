"""Promises kept in a real server process, with real signals: what all servers have in common."""

from __future__ import annotations

import re
import signal
from contextlib import closing

import pytest

from .servers import End, serve


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("path", ["/coroutine", "/function", "/stream"])
def test_tasks_start_at_their_moments_and_do_not_hold_up_the_response(path: str, loop: str) -> None:
    """The client has the whole response, while all three tasks that were started still run."""
    with serve("moments:app", "--loop", loop) as server:
        status, _ = server.get(path)
        server.said.wait_for("after_response started")
        assert status == 200
        assert server.said.so_far() == [
            "now started",
            "returning",
            "after_route started",
            "serialized",
            "sent",
            "after_response started",
        ]
        server.get("/release")
        for name in ("now", "after_route", "after_response"):
            server.said.wait_for(f"{name} finished")


def test_an_immediate_task_starts_before_the_response_is_made_even_if_nobody_awaits() -> None:
    """An endpoint without a single ``await`` has what it started run before its value is sent."""
    with serve("moments:app") as server:
        server.get("/prompt")
        server.said.wait_for("sent")
        assert server.said.so_far() == ["returning", "now started", "serialized", "sent"]


def test_background_tasks_of_fastapi_run_too_and_hold_up_nothing() -> None:
    """One that takes its time does not keep our tasks from starting after the response."""
    with serve("moments:app") as server:
        assert server.get("/background") == (200, b"null")
        server.said.wait_for("background task finished")


def test_a_client_that_leaves_in_the_middle_of_a_stream_is_the_end_of_the_response() -> None:
    """What was to happen after the response happens, and the server serves on."""
    with serve("moments:app") as server:
        with closing(server.connect()) as connection:
            connection.request("GET", "/endless")
            with connection.getresponse() as response:
                assert response.read(10) == b"first part"
                assert server.said.so_far() == []
        server.said.wait_for("after_response started")
        assert server.get("/release") == (200, b"null")
        server.said.wait_for("after_response finished")


def test_a_task_that_wants_to_end_the_process_has_failed_and_that_is_all() -> None:
    """The server serves on, and the log has one record of it."""
    with serve("moments:app") as server:
        assert server.get("/leave") == (200, b"null")
        assert server.get("/release") == (200, b"null")
        record, *traceback = server.stop().ours
    assert record == "Task leave failed in attempt 1"
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "SystemExit: 3"


def test_whoever_waits_for_such_a_task_does_not_end_the_process_either() -> None:
    """The endpoint fails with an ordinary error, and the server serves on."""
    with serve("moments:app") as server:
        status, _ = server.get("/leave-together")
        assert status == 500
        assert server.get("/release") == (200, b"null")
        assert any("Application shutdown complete" in line for line in server.stop().log)


@pytest.fixture(scope="module")
def drained() -> End:
    """Stop a server while tasks of each kind are running, and return how it has ended."""
    with serve("draining:app") as server:
        server.get("/work")
        for name in ("lost", "kept", "kept_in_thread"):
            server.said.wait_for(f"{name} started")
        return server.stop()


def test_sigterm_cancels_unshielded_tasks_and_waits_for_shielded_ones(drained: End) -> None:
    """Those that are waited for finish, in the event loop and in threads."""
    ends = {" ".join(line.split()[:2]) for line in drained.said[3:]}
    assert {"kept finished", "kept_in_thread finished", "lost cancelled"} <= ends


def test_the_lifespan_closes_nothing_before_the_last_task_has_ended(drained: End) -> None:
    """Whatever the user's lifespan holds is there for each task to its end, cancelled or not."""
    *ends, last = (line.split(maxsplit=1)[1] for line in drained.said[3:])
    assert sorted(ends) == [
        "cancelled while the resource is open",
        "finished while the resource is open",
        "finished while the resource is open",
    ]
    assert last == "closed"


def test_standard_error_has_nothing_but_the_log(drained: End) -> None:
    """One record names who was cancelled; no traceback and no complaint of the event loop's."""
    assert drained.ours == ["Shutdown: cancelling lost"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_with_tasks_ends_like_one_without(number: signal.Signals) -> None:
    """An app that has no task running is stopped with the same exit status and the same log."""
    ends: list[tuple[int, list[str]]] = []
    with serve("idle:with_tasks") as with_tasks, serve("idle:plain") as plain:
        for server in (with_tasks, plain):
            assert server.get("/openapi.json")[0] == 200
            end = server.stop(number)
            ends.append((end.status, [re.sub(r"\d+", "N", line) for line in end.log]))
    assert ends[0] == ends[1]


def test_tasks_that_run_change_nothing_about_the_exit_status(drained: End) -> None:
    """Whoever started the server sees it end as if there had been no task."""
    with serve("idle:plain") as plain:
        plain.get("/openapi.json")
        assert drained.status == plain.stop().status


def test_a_shielded_task_schedules_more_while_the_server_stops() -> None:
    """Shielded follow-up work is done, other work is dropped with a record."""
    with serve("draining:app") as server:
        server.get("/follow-up")
        server.said.wait_for("kept_with_follow_up started")
        end = server.stop()
    assert end.said == [
        "lost started",
        "kept_with_follow_up started",
        "lost cancelled while the resource is open",
        "kept started",
        "kept finished while the resource is open",
        "resource closed",
    ]
    assert end.ours == [
        "Shutdown: cancelling lost",
        "Task lost was dropped: the app is shutting down, and the task is not shielded",
    ]


def test_a_request_that_is_served_when_the_signal_comes_still_has_its_tasks_run() -> None:
    """The server finishes the response, and then what was scheduled for after it."""
    with serve("draining:app") as server, closing(server.connect()) as connection:
        connection.request("GET", "/held")
        server.said.wait_for("held")

        def let_go() -> None:
            server.log.wait_for("Waiting for connections to close")
            server.stdin.write("\n")
            server.stdin.flush()
            assert connection.getresponse().read() == b'"answered"'

        end = server.stop(then=let_go)
    assert end.said == [
        "held",
        "kept started",
        "kept finished while the resource is open",
        "resource closed",
    ]
    assert end.ours == []


def test_a_task_that_does_not_end_is_left_behind() -> None:
    """Neither the lifespan nor the end of the event loop waits for it longer than it may."""
    with serve("hurried:app") as server:
        server.get("/stubborn")
        server.said.wait_for("stubborn started")
        end = server.stop()
    assert end.said == ["stubborn started", "stubborn goes on", "resource closed"]
    assert end.ours == [
        "Shutdown: cancelling stubborn",
        "Shutdown: abandoning stubborn, which did not end in time",
    ]


def test_a_shielded_task_that_takes_longer_than_shutdown_timeout_is_cancelled() -> None:
    """It is told so while there is time to clean up, and everything to do it with."""
    with serve("hurried:app") as server:
        server.get("/long")
        server.said.wait_for("long started")
        end = server.stop()
    assert end.said == [
        "long started",
        "long cancelled while the resource is open",
        "resource closed",
    ]
    assert end.ours == ["Shutdown: cancelling long"]
