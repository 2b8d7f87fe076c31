"""A recipe's config is a frozen dataclass; the command line overrides it by typed ``key=value`` words."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

C = TypeVar("C")


def override(config: C, words: Iterable[str]) -> C:
    """``config`` with ``key=value`` words applied.

    Raises:
        ValueError: a word without ``=``, an unknown key (the nearest ones are named), or a value of another type.
    """
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"an override is written key=value; got {word!r}.")
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=3, cutoff=0.4)
            raise ValueError(
                f"unknown key {key!r}. " + (f"Did you mean {' or '.join(near)}?" if near else _known(hints))
            )
        if key in changes:
            raise ValueError(f"{key} is given twice.")
        changes[key] = _parse(key, value, hints[key])
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
    """The config that ``dataclasses.asdict`` wrote, e.g. into a checkpoint. Raises ``ValueError`` for unknown keys."""
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise ValueError(f"the config holds an unknown key {sorted(unknown)[0]!r}; it was written by another version.")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises ``ValueError`` for the first number outside its closed range; a range without an end still wants finite ones."""
    for key, (low, high) in ranges.items():
        value = getattr(config, key)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            wanted = f"in [{low}, {high}]" if math.isfinite(high) else f"at least {low}"
            raise ValueError(f"{key} is {wanted}, got {value}.")


def _known(hints: Mapping[str, Any]) -> str:
    return f"Known keys: {', '.join(hints)}."


def _parse(key: str, text: str, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    try:
        if origin in (typing.Union, types.UnionType):
            return (
                None
                if text.lower() in ("none", "")
                else _parse(key, text, next(a for a in args if a is not type(None)))
            )
        if origin is typing.Literal:
            if text not in args:
                raise ValueError
            return text
        if hint is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if origin is tuple:
            kind, several = args[0], args[-1] is ...
            parts = tuple(kind(p) for p in text.lower().split("x" if kind is int else ",") if p or not several)
            if not several and len(parts) != len(args):
                raise ValueError
            return parts
        return hint(text)
    except (ValueError, KeyError):
        wanted = f"one of {', '.join(args)}" if origin is typing.Literal else _name(hint)
        raise ValueError(f"{key} must be {wanted}; got {text!r}.") from None


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "whole numbers like 16x1" if typing.get_args(hint)[0] is int else "numbers like 0.5,0.25"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _name(a) for a in typing.get_args(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(hint, str(hint))
