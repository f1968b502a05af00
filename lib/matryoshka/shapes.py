"""What JSON that was read must look like before anything relies on it: shapes, and the first thing that does not fit.

A file may have been cut off, edited, or written by somebody else; its reader names what is wrong instead of stumbling over it.

A shape is a type (``int``: of 64 bits; ``float``: any finite number; ``str``: text that can be written down; ``object``:
anything) or a union of types, a set of texts, a tuple (a list of just these), a mapping of names to shapes (a name that ends in
``?`` may be missing, others may be there besides), or one of the classes below.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any

Shape = Any

_LARGEST_WHOLE, _LARGEST = 2**63 - 1, 1.7e308
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list, each part of which has the shape."""

    shape: Shape


@dataclass(frozen=True, slots=True)
class MapOf:
    """A mapping, each value of which has the shape."""

    shape: Shape = object


def check(value: Any, shape: Shape, place: str, advice: str = "Restore the file, or make it anew.") -> None:
    """Checks that a value has a shape.

    Args:
        value: As it came from JSON.
        shape: What it must look like.
        place: What to name in an error.
        advice: What to do then.

    Raises:
        ValueError: It has not; the first part that does not fit is named.

    >>> check({"plan": ["64:200", 7]}, {"plan": ListOf(str)}, "manifest.json")
    Traceback (most recent call last):
        ...
    ValueError: manifest.json: plan.1 is not text (found 7). Restore the file, or make it anew.
    """
    fault = find_fault(value, shape)
    if fault:
        raise ValueError(f"{place}: {fault}. {advice}")


def find_fault(value: Any, shape: Shape) -> str:
    """Returns what is wrong with the first part of a value that does not fit a shape, or nothing.

    >>> find_fault({"a": [1, None]}, {"a": (int, int | None), "b?": str})
    ''
    """
    fault = _find(value, shape)
    return f"{'.'.join(fault[:-1]) or 'it'} {fault[-1]}" if fault else ""


Fault = tuple[str, ...]
"""The names on the way to a part that does not fit, and what is wrong with it; none: nothing is."""


def _find(value: Any, shape: Shape) -> Fault:
    if isinstance(shape, type):
        return () if _is_a(value, shape) else _unlike(_WORDS[shape], value)
    if isinstance(shape, dict):
        return _find_in_mapping(value, shape)
    if isinstance(shape, ListOf | tuple):
        return _find_in_list(value, shape)
    if isinstance(shape, UnionType):
        faults = [_find(value, own) for own in shape.__args__]
        return () if () in faults else faults[0]
    if isinstance(shape, MapOf):
        own = {} if shape.shape is object or not isinstance(value, dict) else dict.fromkeys(value, shape.shape)
        return _find_in_mapping(value, own)
    return () if isinstance(value, str) and value in shape else _unlike(f"one of {', '.join(sorted(shape))}", value)


def _is_a(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str) and _is_text(value)
    if kind is object:
        return True
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= _LARGEST
    if kind is int:
        return isinstance(value, int) and -_LARGEST_WHOLE <= value <= _LARGEST_WHOLE
    return isinstance(value, kind)


def _is_text(value: str) -> bool:
    """Returns whether a text can stand in a file, a path and a message: half a surrogate pair or a NUL cannot."""
    return "\0" not in value and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def _find_in_list(value: Any, shape: ListOf | tuple[Shape, ...]) -> Fault:
    if not isinstance(value, list | tuple):
        return _unlike("a list", value)
    if isinstance(shape, tuple) and len(value) != len(shape):
        return (f"has {len(value)} parts, not {len(shape)}",)
    for number, part in enumerate(value):
        fault = _find(part, shape[number] if isinstance(shape, tuple) else shape.shape)
        if fault:
            return (str(number), *fault)
    return ()


def _find_in_mapping(value: Any, shape: Mapping[str, Shape]) -> Fault:
    if not isinstance(value, dict):
        return _unlike("a mapping", value)
    for key, own in shape.items():
        name = key.removesuffix("?")
        if name in value:
            fault = _find(value[name], own)
            if fault:
                return (name, *fault)
        elif name == key:
            return (name, "is missing")
    return ()


def _unlike(wanted: str, value: Any) -> Fault:
    found = ascii(value) if isinstance(value, str | int | float) else type(value).__name__
    return (f"is not {wanted} (found {found if len(found) <= _SHOWN else f'{found[:_SHOWN]}...'})",)


def leads_out(path: str) -> bool:
    """Returns whether a path is none below the folder that it is to be joined to, by its own words; links are another matter.

    >>> [leads_out(path) for path in ("units/a.parquet", "../a.parquet", "/etc/passwd", "units//a", "")]
    [False, True, True, True, True]
    """
    return not {"..", ".", ""}.isdisjoint(path.split("/"))
