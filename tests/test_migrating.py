"""What ``docs/migrating.rst`` says of the first thing that changes, in a real server.

That page's other promises are kept by the blocks behind its diffs; see ``test_docs.py``.
"""

from __future__ import annotations

from contextlib import closing

import pytest

from . import diffs
from .servers import End, Server, serve


def register(server: Server) -> None:
    """Have a text sent that waits to be let go."""
    with closing(server.connect()) as connection:
        connection.request("POST", "/parcels/17")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b'{"number":17}')
    server.said.wait_for("sending 17: on its way")


def stopped(app: str, waits_for: str) -> End:
    """Stop a server while a text is being sent, and let that go on once the server has begun."""
    with serve(f"moving:{app}") as server:
        register(server)

        def let_go() -> None:
            server.log.wait_for(waits_for)
            server.stdin.write("\n")
            server.stdin.flush()

        return server.stop(then=let_go)


def test_uvicorn_waits_for_background_tasks() -> None:
    """They belong to the request."""
    end = stopped("before", "Waiting for background tasks to complete")
    assert (end.said, end.ours) == (["sending 17: on its way", "sent"], [])


def test_with_a_grace_tasks_are_waited_for_as_well() -> None:
    """The diff has one, and so nothing is lost that was not lost before."""
    end = stopped("after", "Waiting for application shutdown")
    assert (end.said, end.ours) == (["sending 17: on its way", "sent"], [])


def test_without_a_grace_they_are_cancelled_and_named() -> None:
    """That is why the page begins with it."""
    end = stopped("forgotten", "Waiting for application shutdown")
    assert end.said == ["sending 17: on its way", "not sent"]
    assert end.ours == ["Shutdown: cancelling text_recipient"]


def test_each_diff_has_two_sides() -> None:
    """A page without a diff, or a diff without a change, would test nothing."""
    found = diffs.diffs_of("migrating")
    assert len(found) == 5
    for before, after in map(diffs.sides, found):
        assert before != after


@pytest.mark.parametrize("line", ["*a", "@@ -1 +1 @@"])
def test_a_line_that_belongs_to_no_side_is_no_part_of_a_diff(line: str) -> None:
    """A reader could not apply it."""
    with pytest.raises(AssertionError):
        diffs.sides(line)
