"""How tasks are configured: one configuration over another, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import gc
import heapq
import inspect
import math
import pickle
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from typing import Any, get_args
from unittest import mock

import anyio
import pytest

from fastapi_tasks import (
    InvalidSettingError,
    InvalidTaskError,
    Retry,
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    TasksScheduler,
    task,
)
from fastapi_tasks.config import RunIf, policy_of


def ring_bell(task: Task, error: Exception) -> None:
    """Tell the captain."""


async def hoist_flag(task: Task, error: Exception) -> None:
    """Tell the harbour."""


def load() -> None:
    """Have no configuration of its own."""


FIELDS = [field.name for field in dataclasses.fields(TaskConfig) if field.init]


# One configuration


def test_a_configuration_cannot_be_changed() -> None:
    """It is shared by every task that was scheduled with it."""
    config = TaskConfig(name="cargo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "ballast"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.name  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        config.nmae = "ballast"  # type: ignore[attr-defined]


def test_a_configuration_is_data() -> None:
    """It can be compared, copied, kept in sets and sent to another process, and taken apart."""
    config = TaskConfig("cargo", shield=False, retry=Retry(OSError), delay=3)
    values = [getattr(config, name) for name in FIELDS]
    again = dataclasses.replace(dataclasses.replace(config, delay=None), delay=3)
    sent = pickle.loads(pickle.dumps(config))

    assert list(inspect.signature(TaskConfig).parameters) == FIELDS
    for same in (TaskConfig(*values), again, copy.copy(config), copy.deepcopy(config), sent):
        assert same == config
        assert len({same, config}) == 1
        assert same.is_plain is config.is_plain is False
    assert config != TaskConfig("cargo")
    assert config != values
    assert config == mock.ANY  # whatever it is compared with may know better


def test_a_supervisors_settings_cannot_be_changed() -> None:
    """They say what it was made with; what it does is settled by then."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Supervisor().settings.grace = 5  # type: ignore[misc]


def test_a_configuration_shows_what_it_sets_and_functions_by_their_names() -> None:
    """What a handler's own repr tells may be private."""
    config = TaskConfig(name="cargo", shield=False, on_error=functools.partial(ring_bell))

    assert repr(config) == "TaskConfig(name='cargo', shield=False, on_error=ring_bell)"


def test_settings_do_not_show_observers() -> None:
    """What an observer's own repr tells may be private, too."""
    assert "print" not in repr(Supervisor(observers=[print]).settings)


def test_equal_configurations_are_equal() -> None:
    """They are data: they can be compared, and be members of sets."""
    assert TaskConfig(name="cargo", shield=True) == TaskConfig(shield=True, name="cargo")
    assert len({TaskConfig(shield=True), TaskConfig(shield=True), TaskConfig(shield=False)}) == 2


def test_a_configuration_sets_nothing_by_itself() -> None:
    """Every field that is not given is left to the outer configuration."""
    assert [getattr(TaskConfig(), field) for field in FIELDS] == [None] * len(FIELDS)


@pytest.mark.parametrize(("shield", "shielded"), [(None, False), (False, False), (True, True)])
def test_shielding_is_asked_for(shield: bool | None, shielded: bool) -> None:
    """A task that nobody shields is not shielded."""
    assert TaskConfig(shield=shield).shielded is shielded


# One over another


def test_a_call_can_take_back_what_the_app_shields() -> None:
    """False is an answer, and not the same as no answer."""
    supervisor = Supervisor(config=TaskConfig(shield=True))

    assert supervisor.schedule(load).config.shielded
    assert not supervisor.task(shield=False).schedule(load).config.shielded


def test_a_function_can_take_back_what_the_app_shields() -> None:
    """And the call what the function does."""
    supervisor = Supervisor(config=TaskConfig(shield=True))

    @task(shield=False)
    def unload() -> None:
        """Have a configuration that is not the app's."""

    assert not supervisor.schedule(unload).config.shielded
    assert supervisor.task(shield=True).schedule(unload).config.shielded


# App, function, call

APP = TaskConfig(name="app", on_error=ring_bell, shield=True, run_if="always")


@task(name="function", on_error=hoist_flag)
def sail() -> None:
    """Have a configuration of its own."""


PLACES: list[Any] = [
    pytest.param(lambda supervisor: supervisor, id="supervisor"),
    pytest.param(TasksScheduler, id="immediate"),
    pytest.param(lambda supervisor: TasksScheduler(supervisor).after_route, id="after_route"),
    pytest.param(lambda supervisor: TasksScheduler(supervisor).after_response, id="after_response"),
]


@pytest.mark.parametrize("place", PLACES)
def test_the_function_goes_over_the_app_and_the_call_over_both(
    place: Callable[[Supervisor], Any],
) -> None:
    """Wherever the task is scheduled."""
    tasks = place(Supervisor(config=APP))

    assert tasks.schedule(load).config == APP
    assert tasks.schedule(sail).config == TaskConfig(
        name="function", on_error=hoist_flag, shield=True, run_if="always"
    )
    assert tasks.task(name="call", shield=False).schedule(sail).config == TaskConfig(
        name="call", on_error=hoist_flag, shield=False, run_if="always"
    )


@pytest.mark.parametrize("place", PLACES)
def test_a_whole_configuration_does_what_its_fields_do(
    place: Callable[[Supervisor], Any],
) -> None:
    """It can be made once and given to many calls."""
    tasks = place(Supervisor())
    careful = TaskConfig(name="careful", shield=True)

    assert tasks.task(careful).schedule(load).config == careful
    assert tasks.task(name="careful", shield=True).schedule(load).config == careful


@pytest.mark.parametrize("place", PLACES)
def test_configurations_of_calls_pile_up(place: Callable[[Supervisor], Any]) -> None:
    """The last call of .task() goes over those before it, and over the function."""
    tasks = place(Supervisor(config=APP))
    first = tasks.task(name="first", shield=False)
    second = first.task(name="second", on_error=ring_bell)

    assert second.schedule(sail).config == TaskConfig(
        name="second", shield=False, on_error=ring_bell, run_if="always"
    )
    assert first.schedule(sail).config.name == "first"
    assert tasks.schedule(sail).config.name == "function"


def test_a_scheduler_may_have_another_configuration_than_its_supervisor() -> None:
    """A mounted app's own goes over the outer app's: on all three moments."""
    tasks = TasksScheduler(Supervisor(config=APP), TaskConfig(name="mounted"))

    for place in (tasks, tasks.after_route, tasks.after_response):
        assert place.schedule(load).config == TaskConfig(name="mounted")


# A function's own


def test_the_decorator_returns_the_function_itself() -> None:
    """It can be called, tested and awaited as if it were no task."""

    def anchor() -> None:
        """Do what a task does."""

    assert task(shield=True)(anchor) is anchor


def test_a_decorator_goes_over_another_one() -> None:
    """Field by field, also on what is made of a decorated function."""

    furl = task(timeout=5)(task(name="inner", timeout=3)(lambda: None))
    partial = functools.partial(furl)
    assert task(shield=True)(partial) is partial

    assert policy_of(furl) == TaskConfig(name="inner", timeout=5)
    assert policy_of(partial) == TaskConfig(name="inner", timeout=5, shield=True)


def test_the_decorator_takes_a_whole_configuration() -> None:
    """The same one as tasks.task()."""
    careful = TaskConfig(name="careful", shield=True)

    @task(careful)
    async def anchor() -> None:
        """Do what a task does."""

    assert Supervisor().schedule(anchor).config == careful


class Crane:
    """Methods and instances with a policy."""

    @task(name="lift")
    def lift(self) -> None:
        """Be a method."""

    @task(name="call")
    async def __call__(self) -> None:
        """Be an instance's call."""

    @task(name="weigh")
    @staticmethod
    def weigh() -> None:
        """Be a static method."""

    @task(name="build")
    @classmethod
    def build(cls) -> None:
        """Be a class method."""


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (functools.partial(functools.partial(sail)), "function"),
        (task(name="own")(functools.partial(sail)), "own"),
        (Crane().lift, "lift"),
        (functools.partial(Crane().lift), "lift"),
        (Crane(), "call"),
        (functools.partial(Crane()), "call"),
        (Crane.weigh, "weigh"),
        (Crane().weigh, "weigh"),
        (Crane.build, "build"),
        (functools.partial(Crane().build), "build"),
    ],
)
def test_a_policy_is_found_in_whatever_the_function_is_part_of(
    function: Callable[[], Any], name: str
) -> None:
    """A partial, a method or an instance does not lose what its function asks for."""
    assert Supervisor().schedule(function).config.name == name


def test_what_cannot_carry_a_policy_is_refused() -> None:
    """The error says how to give it at the call."""
    with pytest.raises(InvalidTaskError, match=r"tasks\.task\(shield=True\)\.schedule"):
        task(shield=True)(print)


def swing() -> Iterator[int]:
    """Be a generator function."""
    yield 1  # pragma: no cover - it is refused, and so never called


async def sway() -> AsyncIterator[int]:
    """Be one of the other kind."""
    yield 1  # pragma: no cover - it is refused, and so never called


@pytest.mark.parametrize(
    ("thing", "problem"),
    [
        (42, "got int, which cannot be called"),
        (swing, "the generator function swing"),
        (sway, "the generator function sway"),
        (staticmethod(swing), "the generator function swing"),
    ],
)
def test_what_is_no_task_is_refused_by_the_decorator(thing: Any, problem: str) -> None:
    """Where it is written, and not in the first request that schedules it."""
    with pytest.raises(InvalidTaskError) as caught:
        task(shield=True)(thing)

    assert problem in str(caught.value)


# What is refused


async def watch_async(event: TaskEvent) -> None:
    """Be an observer that would never be awaited."""


Make = Callable[..., object]


def decorated(**fields: Any) -> object:
    """Use the decorator."""
    return task(**fields)(load)


def called(**fields: Any) -> object:
    """Use the method, where each field makes sense."""
    return TasksScheduler(Supervisor()).after_response.task(**fields)


BAD_FIELDS: list[Any] = [
    ("name", "", "str"),
    ("name", 7, "int"),
    ("name", b"cargo", "bytes"),
    ("shield", "yes", "str"),
    ("shield", 1, "int"),
    ("on_error", "ring_bell", "str"),
    ("on_error", heapq.merge, "a generator function"),
    ("run_if", "sometimes", "str"),
    ("run_if", True, "bool"),
    ("run_if", ["success"], "list"),
    ("retry", 3, "int"),
    ("retry", True, "bool"),
    ("retry", ConnectionError, "the type ConnectionError"),
    ("retry", (ConnectionError, TimeoutError), "tuple"),
    ("retry", Retry, "the type Retry"),
    ("retry", load, "function"),
]

BAD_RETRIES: list[Any] = [
    ("on", None, "NoneType"),
    ("on", "ConnectionError", "str"),
    ("on", ConnectionError(), "ConnectionError"),
    ("on", BaseException, "the type BaseException"),
    ("on", KeyboardInterrupt, "the type KeyboardInterrupt"),
    ("on", asyncio.CancelledError, "the type CancelledError"),
    ("on", int, "the type int"),
    ("on", (), "tuple"),
    ("on", (OSError, SystemExit), "tuple"),
    ("on", (OSError, "ValueError"), "tuple"),
    ("on", (OSError, (ValueError,)), "tuple"),
    ("on", [OSError], "list"),
    ("on", hoist_flag, "an async function"),
    ("on", heapq.merge, "a generator function"),
    ("attempts", 0, "int"),
    ("attempts", -1, "int"),
    ("attempts", True, "bool"),
    ("attempts", 3.0, "float"),
    ("attempts", math.inf, "float"),
    ("attempts", "3", "str"),
    ("attempts", None, "NoneType"),
    *[
        (field, value, type(value).__name__)
        for field in ("wait_initial", "wait_max", "wait_jitter")
        for value in (-1, -0.1, math.nan, math.inf, True, "1", None, timedelta(-1), [1])
    ],
    ("wait_exp_base", 0.99, "float"),
    ("wait_exp_base", 0, "int"),
    ("wait_exp_base", -2, "int"),
    ("wait_exp_base", math.nan, "float"),
    ("wait_exp_base", math.inf, "float"),
    ("wait_exp_base", True, "bool"),
    ("wait_exp_base", "2", "str"),
    ("wait_exp_base", None, "NoneType"),
    ("timeout", 0, "int"),
    ("timeout", -1, "int"),
    ("timeout", math.nan, "float"),
    ("timeout", True, "bool"),
    ("timeout", "60", "str"),
    ("timeout", timedelta(0), "timedelta"),
    ("timeout", timedelta(seconds=-60), "timedelta"),
]

BAD_CONTROLS: list[Any] = [
    ("timeout", 0, "int"),
    ("timeout", 0.0, "float"),
    ("timeout", -1, "int"),
    ("timeout", timedelta(0), "timedelta"),
    ("timeout", timedelta(seconds=-1), "timedelta"),
    ("timeout", math.nan, "float"),
    ("timeout", -math.inf, "float"),
    ("timeout", True, "bool"),
    ("timeout", "30", "str"),
    ("delay", -1, "int"),
    ("delay", -0.001, "float"),
    ("delay", timedelta(microseconds=-1), "timedelta"),
    ("delay", math.inf, "float"),
    ("delay", math.nan, "float"),
    ("delay", False, "bool"),
    ("delay", "soon", "str"),
    ("limiter", 5, "int"),
    ("limiter", "5", "str"),
    ("limiter", anyio.CapacityLimiter, "the type CapacityLimiter"),
    ("limiter", asyncio.Semaphore(5), "Semaphore"),
]
"""Wrong times and limiters."""

BAD_SETTINGS: list[Any] = [
    ("config", {"shield": True}, "dict"),
    ("grace", -1, "int"),
    ("grace", -0.001, "float"),
    ("grace", math.nan, "float"),
    ("grace", math.inf, "float"),
    ("grace", True, "bool"),
    ("grace", "10", "str"),
    ("grace", None, "NoneType"),
    ("shutdown_timeout", 0, "int"),
    ("shutdown_timeout", -5, "int"),
    ("shutdown_timeout", math.nan, "float"),
    ("shutdown_timeout", True, "bool"),
    ("shutdown_timeout", "25", "str"),
    ("threads", 0, "int"),
    ("threads", -1, "int"),
    ("threads", True, "bool"),
    ("threads", 2.0, "float"),
    ("threads", "40", "str"),
    ("threads", None, "NoneType"),
    ("max_tasks", 0, "int"),
    ("max_tasks", -1, "int"),
    ("max_tasks", True, "bool"),
    ("max_tasks", 1.5, "float"),
    ("max_tasks", "many", "str"),
    ("history", -1, "int"),
    ("history", True, "bool"),
    ("history", 1.5, "float"),
    ("history", None, "NoneType"),
]


def shown(value: object) -> str:
    """Return what an error shows: plain values and names, since a repr may hold secrets."""
    if isinstance(value, str | int | float | None):
        return f"={value!r}"
    return f"={value.__qualname__}" if inspect.isfunction(value) else ""


def expect_refusal(make: Callable[[], object], setting: str, value: object, kind: str) -> str:
    """Check an error: what came, what was expected, and a line to write that is Python."""
    with pytest.raises(InvalidSettingError) as caught:
        make()

    assert isinstance(caught.value, ValueError)
    assert caught.value.setting == setting
    message, _, line = str(caught.value).partition(" Write for example: ")
    assert message.startswith(f"{setting}{shown(value)}: expected ")
    assert message.endswith(f", got {kind}.")
    assert setting in line
    compile(line, "the line to write", "eval")
    return str(caught.value)


@pytest.mark.parametrize(("field", "value", "kind"), BAD_RETRIES)
def test_a_wrong_retry_is_refused_where_it_is_written(field: str, value: object, kind: str) -> None:
    """And not when a task has failed, in the night; the line to write is itself right."""
    error = expect_refusal(lambda: Retry(**{"on": OSError, field: value}), field, value, kind)  # type: ignore[arg-type]
    assert isinstance(eval(error.partition(" Write for example: ")[2]), Retry)


def test_a_retry_says_after_which_errors() -> None:
    """There is no safe default: that a function may run twice is for its author to know."""
    error = expect_refusal(Retry, "on", None, "NoneType")
    assert "a type of Exception, a tuple of them, or a function" in error


RETRIES = [
    Retry(OSError),
    Retry((OSError, ValueError), attempts=1, wait_initial=0, wait_max=0, wait_jitter=0),
    Retry(callable, attempts=10**6, wait_exp_base=1, timeout=math.inf),
    Retry(
        on=Exception,
        wait_initial=timedelta(seconds=1),
        wait_max=timedelta(hours=1),
        wait_jitter=timedelta(0),
        timeout=timedelta(minutes=5),
    ),
]


@pytest.mark.parametrize("retry", RETRIES)
def test_a_retry_is_data(retry: Retry) -> None:
    """It can be compared, copied, kept in sets and sent to another process, but not changed."""
    changed = dataclasses.replace(retry, attempts=2)
    again = dataclasses.replace(changed, attempts=retry.attempts)
    assert again == retry == copy.copy(retry) == copy.deepcopy(retry)
    assert pickle.loads(pickle.dumps(retry)) == retry
    assert len({again, retry, changed}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        retry.attempts = 2  # type: ignore[misc]


def test_what_is_not_given_to_a_retry_has_the_documented_values() -> None:
    """Three attempts, about a tenth of a second and twice that between them, no limit of time."""
    retry = Retry(OSError)
    assert (retry.attempts, retry.timeout) == (3, None)
    assert (retry.wait_initial, retry.wait_max, retry.wait_jitter) == (0.1, 5, 1)
    assert retry.wait_exp_base == 2


class Code:
    """A function with something that nobody is to see."""

    __call__ = staticmethod(callable)
    __repr__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("retry", "text"),
    [
        (Retry(OSError), "Retry(on=OSError)"),
        (Retry(OSError, attempts=3), "Retry(on=OSError)"),
        (Retry((OSError, KeyError), attempts=5), "Retry(on=(OSError, KeyError), attempts=5)"),
        (Retry(callable, timeout=60), "Retry(on=callable, timeout=60)"),
        (Retry(functools.partial(hasattr, Code())), "Retry(on=hasattr)"),
        (Retry(Code()), "Retry(on=Code)"),
    ],
)
def test_a_retry_shows_what_was_set_and_no_private_data(retry: Retry, text: str) -> None:
    """A partial's arguments are as private as a task's."""
    assert repr(retry) == text
    assert repr(TaskConfig(retry=retry)) == f"TaskConfig(retry={text})"


@pytest.mark.parametrize(("field", "value", "kind"), [*BAD_FIELDS, *BAD_CONTROLS])
@pytest.mark.parametrize("make", [TaskConfig, decorated, called])
def test_a_wrong_field_is_refused_where_it_is_written(
    make: Make, field: str, value: object, kind: str
) -> None:
    """At once, and not at the shutdown that it was meant for."""
    expect_refusal(lambda: make(**{field: value}), field, value, kind)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout", math.inf),
        ("timeout", 1e-9),
        ("timeout", timedelta.max),
        ("delay", 0),
        ("delay", timedelta(0)),
        ("delay", timedelta.max),
        ("limiter", anyio.CapacityLimiter(math.inf)),
    ],
)
def test_times_and_limiters_at_their_limits_are_taken(field: str, value: object) -> None:
    """What makes sense, is no error."""
    assert getattr(TaskConfig(**{field: value}), field) is value  # type: ignore[arg-type]


def test_times_and_limiters_are_shown() -> None:
    """A limiter by its size: its own repr is an address."""
    limiter = anyio.CapacityLimiter(5)
    config = TaskConfig(timeout=30, delay=timedelta(minutes=1), limiter=limiter)

    assert repr(config) == (
        "TaskConfig(timeout=30, delay=datetime.timedelta(seconds=60), limiter=CapacityLimiter(5))"
    )
    unlimited = TaskConfig(limiter=anyio.CapacityLimiter(math.inf))
    assert repr(unlimited) == "TaskConfig(limiter=CapacityLimiter(inf))"


@pytest.mark.parametrize(
    ("config", "is_plain"),
    [
        (TaskConfig(), True),
        (TaskConfig(delay=0, timeout=math.inf), True),
        (TaskConfig(delay=timedelta(0)), True),
        (TaskConfig(timeout=timedelta.max), False),
        (TaskConfig(delay=0.1), False),
        (TaskConfig(limiter=anyio.CapacityLimiter(math.inf)), False),
    ],
)
def test_what_limits_nothing_is_free(config: TaskConfig, is_plain: bool) -> None:
    """A task that takes back what its function sets is run as one for which nobody set it."""
    assert TaskConfig(name="cargo").merge(config).is_plain is is_plain


def test_a_call_in_the_place_of_a_handler_is_refused_and_cleaned_up() -> None:
    """Nobody is warned about the coroutine, which was never awaited, a second time."""
    handler: Any = hoist_flag
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        coroutine = handler(None, None)
        with pytest.raises(InvalidSettingError, match=r"on_error: .*, got coroutine"):
            TaskConfig(on_error=coroutine)
        state = inspect.getcoroutinestate(coroutine)
        del coroutine
        gc.collect()

    assert (state, warned) == (inspect.CORO_CLOSED, [])


@pytest.mark.parametrize(("setting", "value", "kind"), BAD_SETTINGS)
def test_a_wrong_setting_is_refused_where_it_is_written(
    setting: str, value: object, kind: str
) -> None:
    """Before the app starts."""
    expect_refusal(lambda: Supervisor(**{setting: value}), setting, value, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("observers", "value", "kind"),
    [
        (["log"], "log", "str"),
        ([print, None], None, "NoneType"),
        ([heapq.merge], heapq.merge, "a generator function"),
        ([watch_async], watch_async, "an async function"),
    ],
)
def test_an_observer_that_cannot_be_called_is_refused(
    observers: Any, value: object, kind: str
) -> None:
    """So is a coroutine or generator function, whose body would not run; the error names it."""
    expect_refusal(lambda: Supervisor(observers=observers), "observers", value, kind)


@pytest.mark.parametrize("observers", [print, 5])
def test_observers_are_a_sequence(observers: Any) -> None:
    """One observer without a list around it is refused like any other wrong setting."""
    expect_refusal(
        lambda: Supervisor(observers=observers), "observers", observers, type(observers).__name__
    )


def test_a_shutdown_cannot_be_over_before_its_grace() -> None:
    """The two settings are told in one error."""
    with pytest.raises(InvalidSettingError, match="not less than grace=10") as caught:
        Supervisor(grace=10, shutdown_timeout=9.5)

    assert "shutdown_timeout=9.5" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grace": 0, "shutdown_timeout": 0.1},
        {"grace": 10, "shutdown_timeout": 10},
        {"grace": 1e6, "shutdown_timeout": math.inf},
        {"grace": 3.5, "shutdown_timeout": None, "threads": 1},
        {"max_tasks": 1},
        {"max_tasks": None},
        {"history": 0},
        {"history": 1},
    ],
)
def test_settings_at_their_limits_are_taken(settings: dict[str, Any]) -> None:
    """What makes sense, is no error."""
    supervisor = Supervisor(**settings)

    for setting, value in settings.items():
        assert getattr(supervisor.settings, setting) == value


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("run_if", get_args(RunIf))
@pytest.mark.parametrize("chained", [False, True])
def test_a_task_that_starts_now_cannot_depend_on_the_outcome(
    place: Callable[[Supervisor], Any], run_if: RunIf, chained: bool
) -> None:
    """run_if is refused there, and the error names the moments that have it."""
    tasks = place(Supervisor())
    if chained:
        tasks = tasks.task(shield=True)

    expect_refusal(lambda: tasks.task(run_if=run_if), "run_if", run_if, "str")
    with pytest.raises(InvalidSettingError, match=r"after_response\.task\(run_if="):
        tasks.task(TaskConfig(run_if=run_if))


@pytest.mark.parametrize("place", PLACES[:2])
def test_a_function_that_depends_on_the_outcome_cannot_start_now(
    place: Callable[[Supervisor], Any],
) -> None:
    """Else it would run whatever the outcome is; on the batches it can be scheduled."""

    @task(run_if="error")
    def mourn() -> None:
        """Have a configuration that makes no sense everywhere."""

    expect_refusal(lambda: place(Supervisor()).schedule(mourn), "run_if", "error", "str")
    assert TasksScheduler(Supervisor()).after_route.schedule(mourn).config.run_if == "error"


@pytest.mark.parametrize("make", [task, Supervisor().task])
@pytest.mark.parametrize(
    ("args", "fields"),
    [((TaskConfig(),), {"shield": True}), (({"shield": True},), {}), ((load,), {})],
)
def test_a_configuration_is_given_whole_or_as_fields(
    make: Callable[..., object], args: tuple[object, ...], fields: dict[str, object]
) -> None:
    """Both at once would leave open which counts; `@task` without brackets is caught too."""
    with pytest.raises(InvalidSettingError) as caught:
        make(*args, **fields)

    assert "a TaskConfig, or its fields as keyword arguments" in str(caught.value)
    assert ("not both" in str(caught.value)) == bool(fields)


@pytest.mark.parametrize("make", [TaskConfig, task, Supervisor().task])
def test_a_field_that_does_not_exist_is_refused(make: Callable[..., object]) -> None:
    """A slip of the pen is not a setting without effect."""
    with pytest.raises(TypeError, match="sheild"):
        make(sheild=True)
