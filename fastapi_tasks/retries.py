"""The attempts of a task that is retried, which stamina counts and spaces."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, cast

from .config import Duration, Retry, RetryOn, is_wait
from .errors import InvalidSettingError
from .observer import report_bad_retry
from .tasks import Task, enter

if TYPE_CHECKING:
    from stamina import Attempt
    from stamina.instrumentation import RetryDetails

__all__ = ["Attempts", "OnWait"]

OnWait = Callable[[float], object]
"""Is called with the seconds until the next attempt, before they have passed."""

_on_wait: ContextVar[tuple[Exception, OnWait] | None] = ContextVar(
    "fastapi_tasks_on_wait", default=None
)
"""After which error a wait is expected, and who is told of it."""


class Attempts:
    """The attempts of one task, made when the first one is about to begin.

    :param task: the task
    :param retry: how many there are, and when
    """

    def __init__(self, task: Task, retry: Retry) -> None:
        import stamina  # when it is needed: it takes several times as long as all of this package

        self._task = task
        context = stamina.retry_context(
            on=_answer_of(retry.on),
            attempts=retry.attempts,
            timeout=retry.timeout,
            wait_initial=retry.wait_initial,
            wait_max=retry.wait_max,
            wait_jitter=retry.wait_jitter,
            wait_exp_base=retry.wait_exp_base,
        )
        # For the hooks of its instrumentation, which show the arguments that they are given.
        self._attempts = aiter(context.with_name(task.name, (), {}))
        self._attempt: Attempt | None = None

    async def begin(self) -> None:
        """Take the first attempt."""
        self._attempt = await anext(self._attempts)

    async def is_left_after(self, error: Exception, on_wait: OnWait) -> bool:
        """Return whether there is another attempt, when the wait for it is over.

        :param error: what the latest attempt has raised
        :param on_wait: is told of the wait
        """
        assert self._attempt is not None
        traceback = error.__traceback__
        self._attempt.__exit__(type(error), error, traceback)
        _on_wait.set((error, on_wait))
        is_left = True
        try:
            _listen()
            self._attempt = await anext(self._attempts)
        except (Exception, SystemExit) as failure:
            _on_wait.set(None)
            if failure is not error:
                report_bad_retry(self._task, failure)
            # What stamina has made refers to itself, and would keep the error with it.
            self._attempt.__exit__(None, None, None)
            error.with_traceback(traceback)  # without the frames of who raised it again
            is_left = False
        finally:
            del error, on_wait
        enter(self._task)
        return is_left


def _answer_of(on: RetryOn) -> RetryOn:
    """Return what stamina is to ask: a function's answers are checked before they are its."""
    if isinstance(on, type | tuple):
        return cast(RetryOn, on)
    ask = on

    def answer(error: Exception) -> bool | Duration:
        wait = ask(error)
        if isinstance(wait, bool) or is_wait(wait):
            return wait
        raise InvalidSettingError(
            "on",
            wait,
            expected="True, False, or seconds or a timedelta, 0 or more, from the function",
            instead="Retry(on=lambda error: isinstance(error, ConnectionError))",
        )

    return answer


def _listen() -> None:
    """Let stamina tell of each wait; whoever sets its hooks anew has removed ours."""
    from stamina.instrumentation import get_on_retry_hooks, set_on_retry_hooks

    hooks = get_on_retry_hooks()
    if hooks[-1:] != (_tell,):  # the last one, since what follows it is the wait
        set_on_retry_hooks((*(hook for hook in hooks if hook is not _tell), _tell))


def _tell(details: RetryDetails) -> None:
    expected = _on_wait.get()
    # What others retry in functions that are asked, in hooks and in what these start, is theirs.
    if expected is not None and details.caused_by is expected[0]:
        _on_wait.set(None)  # there may be two of us, if two threads began to listen at once
        expected[1](details.wait_for)
        enter(None)  # a timer keeps the context that it was made in until its time
