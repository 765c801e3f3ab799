"""Checks of arguments, whose errors name the argument and the value that was given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["check_choice", "check_flag", "check_number", "check_whole"]


def check_whole(
    name: str, value: Any, least: int | None = None, *, error: type[Exception] = ValueError
) -> None:
    """Raise `error` unless `value` is an int, of at least `least` if that is given."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        range_ = "" if least is None else f" of at least {least}"
        raise error(f"{name} must be a whole number{range_}, not {value!r}")


def check_number(
    name: str, value: Any, *, kind: str = "a number", error: type[Exception] = ValueError
) -> None:
    """Raise `error` unless `value` is an int or a float; `kind` is what the message asks for."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise error(f"{name} must be {kind}, not {value!r}")


def check_flag(name: str, value: Any, *, error: type[Exception] = ValueError) -> None:
    """Raise `error` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False, not {value!r}")


def check_choice(
    name: str, value: Any, choices: Iterable[str], *, error: type[Exception] = ValueError
) -> None:
    """Raise `error` unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise error(f"{name} must be one of {', '.join(choices)}, not {value!r}")
