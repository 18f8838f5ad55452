"""What arguments can be on their way through JSON, and how the caller hears of what they cannot."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field, SecretStr, field_serializer, field_validator

from fastapi_tasks import (
    InvalidArgumentsError,
    InvalidTaskError,
    Supervisor,
    Tasks,
    add_tasks,
)
from fastapi_tasks.engines.arguments import Arguments
from tests.asgi import lifespan, request

from .memory import MemoryEngine

SECRET = "hunter2"
SERIAL = UUID("0c851156-5095-4465-92db-dc0df40a7bf4")


class Roast(Enum):
    LIGHT = "light"
    DARK = "dark"


class Grind(IntEnum):
    FINE = 1


class Bean(BaseModel):
    origin: str = Field(alias="from")
    roast: Roast = Roast.DARK
    picked: datetime | None = None


class Sack(BaseModel):
    bean: Bean
    grams: Decimal


class RareBean(Bean):
    finder: str


class Login(BaseModel):
    password: SecretStr


@dataclass
class Cup:
    size: int
    serial: UUID


class Espresso(BaseModel):
    kind: Literal["espresso"]


class Filter(BaseModel):
    kind: Literal["filter"]


Drink = Annotated[Espresso | Filter, Field(discriminator="kind")]


class Picky(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def refuse(cls, text: str) -> str:
        raise ValueError(f"not {text}")


class Odd(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def break_down(cls, text: str) -> str:
        raise LookupError(text)


class Unwritable(BaseModel):
    text: str = ""

    @field_serializer("text")
    def break_down(self, text: str) -> str:
        raise LookupError(text)


class Opaque:
    """Compares by identity."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls(value),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda o: o.text),
        )


class Incomparable(BaseModel):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise LookupError(SECRET)


class Session:
    """Stands for what belongs to one process."""


def taking(kind: Any) -> Arguments:
    """Return the arguments of a function with one parameter."""

    def brew(value: Any) -> None:
        """Be registered, and never run."""

    brew.__annotations__ = {"value": kind, "return": None}
    return Arguments(brew)


def sent(arguments: Arguments, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Send arguments to a worker, and return what arrives there."""
    return arguments.load(arguments.dump(args, kwargs))


SAMPLES: list[tuple[Any, Any]] = [
    (int, 7),
    (float, 0.1),
    (str, "Łódź"),
    (bool, True),
    (None, None),
    (bytes, b"beans"),
    (Decimal, Decimal("1.10")),
    (UUID, SERIAL),
    (Roast, Roast.LIGHT),
    (Grind, Grind.FINE),
    (Path, Path("beans/dark")),
    (date, date(2024, 2, 29)),
    (datetime, datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=timezone(timedelta(hours=5)))),
    (datetime, datetime(2024, 2, 29, 12, 30)),  # noqa: DTZ001 - a naive one arrives as one
    (timedelta, timedelta(days=400, microseconds=1)),
    (Bean, Bean(**{"from": "Sidamo"}, picked=datetime(2024, 1, 1, tzinfo=UTC))),
    (Sack, Sack(bean=Bean(**{"from": "Sidamo"}), grams=Decimal("250.5"))),
    (Cup, Cup(2, SERIAL)),
    (Drink, Filter(kind="filter")),
    (list[Sack], [Sack(bean=Bean(**{"from": "Yirga"}), grams=Decimal(1))]),
    (dict[UUID, Roast], {SERIAL: Roast.DARK}),
    (set[int], {1, 2}),
    (tuple[int, Roast], (1, Roast.DARK)),
    (int | UUID, SERIAL),
    (Literal["a", "b"], "b"),
    (Any, {"a": [1, 2.5, None, True, "x"]}),
    (object, [10**30]),
]


@pytest.mark.parametrize(("kind", "value"), SAMPLES)
def test_what_is_annotated_arrives_as_it_is(kind: Any, value: Any) -> None:
    """In its type, too."""
    (arrived,), _ = sent(taking(kind), value)

    assert arrived == value
    assert type(arrived) is type(value)


@pytest.mark.parametrize(("kind", "value"), SAMPLES)
def test_so_do_results(kind: Any, value: Any) -> None:
    """They travel the other way."""

    def brew() -> Any:
        """Be registered, and never run."""

    brew.__annotations__ = {"return": kind}
    arguments = Arguments(brew)

    assert arguments.load_result(arguments.dump_result(value)) == value


def test_what_compares_by_identity_is_compared_as_it_is_written() -> None:
    """It would never be equal to itself, once it has arrived."""
    (arrived,), _ = sent(taking(Opaque), Opaque("beans"))

    assert arrived.text == "beans"


def test_a_value_may_be_given_in_the_form_that_pydantic_takes() -> None:
    """A worker gets what the annotation says."""
    assert sent(taking(Bean), {"from": "Sidamo"}) == ((Bean(**{"from": "Sidamo"}),), {})
    assert sent(taking(int), "3") == ((3,), {})


# How functions take them


def everything(a: int, /, b: str, *rest: Roast, c: UUID, d: int = 4, **others: date) -> None:
    """Have parameters of every kind."""


def test_every_kind_of_parameter_is_passed_as_it_was() -> None:
    """By position or by name, one or many."""
    serial, day = SERIAL, date(2024, 1, 1)
    arguments = Arguments(everything)

    assert sent(arguments, 1, "b", Roast.DARK, Roast.LIGHT, c=serial, a=day) == (
        (1, "b", Roast.DARK, Roast.LIGHT),
        {"c": serial, "a": day},
    )


def test_a_default_is_the_worker_s() -> None:
    """What was not passed does not travel: its default may be changed by a deploy."""
    arguments = Arguments(everything)

    assert arguments.dump((1, "b"), {"c": SERIAL}).keys() == {"a", "b", "c"}


def unannotated(value, *values, **named):  # type: ignore[no-untyped-def]
    """Say nothing of the parameters."""


def test_what_is_not_annotated_is_plain_json() -> None:
    """Nothing tells what it was."""
    arguments = Arguments(unannotated)

    assert sent(arguments, {"a": [1]}, None, 2.5, x="y") == (({"a": [1]}, None, 2.5), {"x": "y"})


@pytest.mark.parametrize("value", [(1, 2), datetime(2024, 1, 1, tzinfo=UTC), SERIAL, {1: 2}, b""])
def test_anything_else_needs_an_annotation(value: object) -> None:
    """It would arrive as something else."""
    with pytest.raises(InvalidArgumentsError, match="'value': "):
        Arguments(unannotated).dump((value,), {})


@pytest.mark.parametrize("args", [(), (1, 2)])
def test_arguments_have_to_fit(args: tuple[int, ...]) -> None:
    """As they have to in a call."""
    with pytest.raises(InvalidArgumentsError, match="argument"):
        taking(int).dump(args, {})


def test_a_worker_refuses_what_its_function_does_not_take() -> None:
    """It may have been changed since, or somebody else has written the message."""
    arguments = taking(int)

    with pytest.raises(InvalidArgumentsError, match="arguments that it does not take"):
        arguments.load({"value": 1, SECRET: 2})
    with pytest.raises(InvalidArgumentsError, match="'value' is missing"):
        arguments.load({})
    with pytest.raises(InvalidArgumentsError, match="'value': Input should be a valid integer"):
        arguments.load({"value": "x"})


# What cannot travel


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Login, Login(password=SecretStr(SECRET))),
        (SecretStr, SecretStr(SECRET)),
        (list[SecretStr], [SecretStr(SECRET)]),
        (Bean, RareBean(**{"from": SECRET}, finder="Ada")),
        (UUID | str, "0c851156-5095-4465-92db-dc0df40a7bf4"),
        (datetime | str, "2024-01-01T00:00:00"),
        (Any, math.nan),
        (list[Any], [math.inf]),
        (list[Any], [datetime(2024, 1, 1, tzinfo=UTC)]),
    ],
)
def test_what_would_not_arrive_as_it_is_is_refused(kind: Any, value: Any) -> None:
    """A secret's stars would be charged, and nobody would notice."""
    with pytest.raises(InvalidArgumentsError, match="'value': it would not arrive as it is"):
        taking(kind).dump((value,), {})


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (float, math.nan, "a valid number"),
        (Decimal, Decimal("NaN"), "a finite number"),
        (bytes, b"\xff" + SECRET.encode(), "cannot be written as JSON"),
        (str, "\ud800" + SECRET, "cannot be written as JSON"),
        (list, [Session()], "cannot be written as JSON"),
        (Callable[[], int], lambda: SECRET, "cannot be written as JSON"),
        (Unwritable, Unwritable(text=SECRET), "cannot be written as JSON"),
        (int, SECRET, "a valid integer"),
        (UUID, SECRET, "'value': uuid_parsing."),
        (Drink, {"kind": SECRET}, "'value': union_tag_invalid."),
        (Picky, {"text": SECRET}, "'value': value_error."),
        (Odd, {"text": SECRET}, "its validation raised LookupError"),
        (Incomparable, Incomparable(), "its validation raised LookupError"),
        (dict[str, int], {SECRET: SECRET}, "a valid integer"),
    ],
)
def test_an_error_says_what_is_wrong_and_not_with_what(kind: Any, value: Any, told: str) -> None:
    """Arguments are private, and the texts of validators are anybody's."""
    with pytest.raises(InvalidArgumentsError) as caught:
        taking(kind).dump((value,), {})

    assert told in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_so_does_one_about_a_result() -> None:
    """On both ways."""

    def brew() -> int:
        """Be registered, and never run."""

    arguments = Arguments(brew)
    with pytest.raises(InvalidArgumentsError, match="valid integer") as dumping:
        arguments.dump_result(SECRET)
    with pytest.raises(InvalidArgumentsError, match="valid integer") as loading:
        arguments.load_result(f'"{SECRET}"')
    for caught in (dumping, loading):
        assert "its result: " in str(caught.value)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("kind", [Session, threading.Lock, "Missing", "list[Missing]"])
def test_what_can_never_travel_cannot_be_registered(kind: Any) -> None:
    """So that it is told at the import, and not at the first order."""
    with pytest.raises(InvalidTaskError, match=r"parameter 'value'|cannot be evaluated"):
        taking(kind)


def test_nor_can_a_result_of_a_kind_that_cannot_travel() -> None:
    """Somebody may wait for it."""

    def brew() -> Session:
        """Be registered, and never run."""

    with pytest.raises(InvalidTaskError, match="its result"):
        Arguments(brew)


# Where it is told


async def test_the_caller_of_enqueue_hears_of_it(jobs: MemoryEngine) -> None:
    """Not the worker, a minute later."""

    @jobs.task
    async def charge(order_id: int, how: Any) -> None:
        """Be registered, and never run."""

    async with Supervisor(engines=[jobs]):
        for wrong in (Session(), lambda: SECRET):
            with pytest.raises(InvalidArgumentsError, match="'how'"):
                await jobs.enqueue(charge, 1, wrong)
        with pytest.raises(InvalidArgumentsError, match="'order_id'"):
            await jobs.using(delay=1).enqueue(partial(charge, SECRET), "by card")  # type: ignore[arg-type]
    assert jobs.rows == {}


@pytest.mark.parametrize("moment", ["now", "after_route", "after_response"])
async def test_so_does_the_endpoint_that_schedules_it(jobs: MemoryEngine, moment: str) -> None:
    """Whatever the moment is that it is scheduled for."""
    app = FastAPI()
    add_tasks(app, engines=[jobs])

    @jobs.task
    async def charge(order_id: int) -> None:
        """Be registered, and never run."""

    @app.post("/orders")
    async def order(tasks: Tasks) -> str:
        batch = tasks if moment == "now" else getattr(tasks, moment)
        with pytest.raises(InvalidArgumentsError, match="'order_id'"):
            batch.schedule(charge, Session())
        return "told"

    async with lifespan(app):
        response = await request(app, "/orders", method="POST")
    assert response.json() == "told"
    assert jobs.rows == {}
