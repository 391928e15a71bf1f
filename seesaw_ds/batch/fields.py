"""Typed reading of JSON objects: a wrong value becomes one error that names the field, the value and the rule."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from typing import TypeGuard, TypeVar

JsonObject = dict[str, object]
Default = TypeVar("Default")

SHOWN_CHARS = 60


class FieldError(ValueError):
    """A request's field that cannot be used. `param` and `code` are OpenAI's error fields of these names."""

    def __init__(self, message: str, param: str | None, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


def shown(value: object) -> str:
    """The value as JSON, cut to what fits in an error message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."


def wrong_type(param: str, value: object, expected: str) -> FieldError:
    """The error for a value of another JSON type than `expected`, which completes "must be ..."."""
    return FieldError(f"{param}={shown(value)}: must be {expected}", param, "invalid_type")


def wrong_value(param: str, value: object, rule: str) -> FieldError:
    """The error for a value of the right type that breaks `rule`."""
    return FieldError(f"{param}={shown(value)}: {rule}", param, "invalid_value")


def unknown_field(name: str, known: Iterable[str], where: str, prefix: str = "") -> FieldError:
    """The error for a field that `where` does not have, with the nearest of the `known` names."""
    near = difflib.get_close_matches(name, list(known), n=1)
    mend = f"did you mean {near[0]}?" if near else "remove it"
    # A name can be as long as a line.
    param = prefix + (name if len(name) <= SHOWN_CHARS else name[:SHOWN_CHARS] + "...")
    return FieldError(f"{param}: not a field of {where}; {mend}", param, "unknown_parameter")


def require_object(value: object, param: str) -> JsonObject:
    """`value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise wrong_type(param, value, "an object")
    return value


def require_list(value: object, param: str, expected: str) -> list[object]:
    """`value` if it is a JSON array; `expected` describes the array wanted."""
    if not isinstance(value, list):
        raise wrong_type(param, value, expected)
    return value


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a JSON value is an integer; true and false are not, though Python counts them so."""
    return isinstance(value, int) and not isinstance(value, bool)


class Fields:
    """Reads fields of one JSON object. A field that is absent or null gives the default, as in OpenAI's API."""

    def __init__(self, values: JsonObject) -> None:
        self._values = values

    def raw(self, name: str) -> object:
        """The value as parsed, None when absent."""
        return self._values.get(name)

    def integer(self, name: str, default: Default, low: int, high: int) -> int | Default:
        """An integer from `low` to `high`, both included."""
        value = self._values.get(name)
        if value is None:
            return default
        if not is_integer(value):
            raise wrong_type(name, value, "an integer")
        if not low <= value <= high:
            raise wrong_value(name, value, f"must be from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float, *, above_low: bool = False) -> float:
        """A finite number from `low` (itself excluded if `above_low`) to `high`."""
        value = self._values.get(name)
        if value is None:
            return default
        return check_number(value, name, low, high, above_low=above_low)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_type(name, value, "true or false")
        return value


def check_number(value: object, param: str, low: float, high: float, *, above_low: bool = False) -> float:
    """`value` as a float if it is a finite number from `low` (itself excluded if `above_low`) to `high`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong_type(param, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise wrong_value(param, value, "must be finite")
    if number < low or number > high or (above_low and number == low):
        bound = f"must be above {low:g}" if above_low else f"must be at least {low:g}"
        top = "" if math.isinf(high) else f" and at most {high:g}"
        raise wrong_value(param, value, bound + top)
    return number
