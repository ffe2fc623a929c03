"""Whether the value of a YAML key suits the argument of a class that it is for, by the argument's annotation."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}
"""What a value has to be, for people."""


def require_type(value: Any, annotation: Any, where: str) -> None:
    """Raise if a value is of another type than annotated; what is not annotated may be anything.

    Args:
        value: as YAML gives it.
        annotation: `bool`, `int`, `float`, `str`, a `Sequence` or `Mapping` of them, or a union.
        where: names the key in the message.

    Raises:
        ValueError: saying what the value must be.
    """
    if not _fits(value, annotation):
        raise ValueError(f"{where}: expected {_named(annotation)}, found {value!r}")


def _fits(value: Any, annotation: Any) -> bool:
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, type(None)):
        return isinstance(value, kind)
    if kind is Sequence:
        return isinstance(value, list) and all(_fits(v, part) for v in value for part in parts)
    if kind is Mapping:
        return isinstance(value, dict)
    return True


def _named(annotation: Any) -> str:
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, types.UnionType):
        return " or ".join(_named(part) for part in parts)
    if kind is Sequence:
        return "a list, each entry " + " or ".join(_named(part) for part in parts)
    if kind is Mapping:
        return "keys with values"
    return NAMES[kind]
