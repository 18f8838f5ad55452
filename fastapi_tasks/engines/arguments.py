"""The arguments and the result of a registered function, on their way through JSON."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast, get_args, get_type_hints

from pydantic import JsonValue, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import ErrorDetails, PydanticSerializationError
from pydantic_core.core_schema import ErrorType

from fastapi_tasks.callables import qualified_name
from fastapi_tasks.errors import InvalidArgumentsError, InvalidTaskError

__all__ = ["Arguments"]

_EMPTY = inspect.Parameter.empty
_KNOWN_PROBLEMS = frozenset(get_args(ErrorType))
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Arguments:
    """Checks a function's arguments and result by its annotations, and writes and reads them.

    What has no annotation, or ``Any``, is taken as plain JSON: text, numbers, booleans, ``None``,
    and lists and dictionaries of them.

    :param func: the function
    :raises InvalidTaskError: one of its annotations says nothing that can be written as JSON
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self._name = qualified_name(func)
        self._signature = inspect.signature(func)
        hints = _hints_of(func, self._name)
        self._adapters: dict[str, TypeAdapter[Any]] = {}
        for name, parameter in self._signature.parameters.items():
            kind: Any = _plain(hints.get(name, Any))
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                kind = list.__class_getitem__(kind)
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                kind = dict.__class_getitem__((str, kind))
            self._adapters[name] = self._adapter(kind, f"its parameter {name!r}")
        self._result = self._adapter(hints.get("return", Any), "its result")

    def dump(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, JsonValue]:
        """Return the arguments of a call by their names, in what JSON knows.

        :raises InvalidArgumentsError: they do not fit the function, or would not arrive as they are
        """
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArgumentsError(self._name, str(error)) from None
        return {name: self._dump_one(name, value) for name, value in bound.arguments.items()}

    def load(self, values: dict[str, JsonValue]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call again.

        :raises InvalidArgumentsError: they do not fit the function, which may have been changed
        """
        unknown = sorted(set(values) - set(self._adapters))
        if unknown:
            raise InvalidArgumentsError(self._name, "there are arguments that it does not take")
        bound = inspect.BoundArguments(self._signature, cast(Any, {}))
        for name, parameter in self._signature.parameters.items():
            if name in values:
                bound.arguments[name] = self._load_one(name, values[name])
            elif parameter.default is _EMPTY and parameter.kind not in _VARIADIC:
                raise InvalidArgumentsError(self._name, f"{name!r} is missing")
        args, kwargs = bound.args, bound.kwargs
        return args, kwargs

    def dump_result(self, value: object) -> str:
        """Return a result as JSON.

        :raises InvalidArgumentsError: it is not what the function is annotated with
        """
        try:
            checked = self._result.validate_python(value)
            return self._result.dump_json(
                checked, by_alias=True, round_trip=True, warnings=False
            ).decode()
        except Exception as error:  # validators are anybody's
            raise InvalidArgumentsError(self._name, f"its result: {_told(error)}") from None

    def load_result(self, text: str | bytes) -> Any:
        """Return a result again.

        :raises InvalidArgumentsError: it is not what the function is annotated with
        """
        try:
            return self._result.validate_json(text)
        except Exception as error:  # validators are anybody's
            raise InvalidArgumentsError(self._name, f"its result: {_told(error)}") from None

    def _adapter(self, kind: Any, what: str) -> TypeAdapter[Any]:
        try:
            return TypeAdapter(_plain(kind))
        except (PydanticSchemaGenerationError, PydanticUserError) as error:
            # Of a long text the first line says which type it is.
            reason = str(error).partition("\n")[0]
            raise InvalidTaskError(
                f"{self._name}, since {what} cannot be written as JSON ({reason})",
                instead="async def charge(order_id: int): ...  # the key, not the object",
            ) from None

    def _dump_one(self, name: str, value: object) -> JsonValue:
        adapter = self._adapters[name]
        try:
            checked = adapter.validate_python(value)
            dumped = _dump(adapter, checked)
            # What is written may be less than there was: a secret's stars, a number that is none.
            is_same = _is_same(adapter, self._load_one(name, dumped), checked, dumped)
        except InvalidArgumentsError:
            raise
        except Exception as error:  # validators are anybody's
            raise InvalidArgumentsError(self._name, f"{name!r}: {_told(error)}") from None
        if not is_same:
            raise InvalidArgumentsError(
                self._name, f"{name!r}: it would not arrive as it is, as JSON has no form for it"
            )
        return dumped

    def _load_one(self, name: str, value: JsonValue) -> Any:
        adapter = self._adapters[name]
        try:
            return adapter.validate_json(_JSON.dump_json(value))
        except Exception as error:  # validators are anybody's, and so is text that is no Unicode
            raise InvalidArgumentsError(self._name, f"{name!r}: {_told(error)}") from None


_JSON: TypeAdapter[Any] = TypeAdapter(JsonValue)


def _hints_of(func: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        return get_type_hints(func, include_extras=True)
    except Exception as error:  # an annotation is any expression
        raise InvalidTaskError(
            f"{name}, since one of its annotations cannot be evaluated "
            f"({type(error).__name__}: {error})",
            instead="annotations that can be, with their imports not below 'if TYPE_CHECKING:'",
        ) from None


def _plain(kind: Any) -> Any:
    return JsonValue if kind is Any or kind is object else kind


def _dump(adapter: TypeAdapter[Any], value: object) -> JsonValue:
    # A union may warn of what it does not write in the first way that it tries.
    return cast(
        JsonValue,
        adapter.dump_python(value, mode="json", by_alias=True, round_trip=True, warnings=False),
    )


def _is_same(adapter: TypeAdapter[Any], arrived: object, sent: object, dumped: JsonValue) -> bool:
    if type(sent).__eq__ is object.__eq__:  # each one equals itself alone
        return _dump(adapter, arrived) == dumped
    return bool(arrived == sent)


def _told(error: Exception) -> str:
    """Return what is wrong with a value, and not what the value is."""
    if isinstance(error, ValidationError):
        problems = error.errors(include_input=False, include_url=False)
        return "; ".join(map(_problem, problems))
    if isinstance(error, (PydanticSerializationError, ValueError)):
        return "it cannot be written as JSON"
    return f"its validation raised {type(error).__name__}"


def _problem(details: ErrorDetails) -> str:
    # What is put into a text may be a part of the value, and a user's own text is unknown.
    is_plain = details["type"] in _KNOWN_PROBLEMS and "ctx" not in details
    return details["msg"] if is_plain else details["type"]
