"""From a mapping to a dataclass, and back."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from data_pipelines.errors import DataError, did_you_mean
from data_pipelines.strict.fields import (
    NO_RULE,
    Part,
    PartOf,
    Rule,
    dotted_names,
    fields_of,
    is_named,
    is_required,
    join,
    kinds_of,
    listed,
    nearest_key,
    part_of,
    rule_of,
    section_of,
    show,
    words,
)

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "config", error: type[Exception] = DataError) -> T:
    """The dataclass ``cls`` from ``values``; an instance of ``cls`` is returned unchanged.

    A list of dataclasses with a field "name" may also be given as a mapping {name: other fields}.

    Raises ``error`` with one line: the dotted name (below ``where``), the value and what is expected. An ``error`` or
    DataError from ``__post_init__`` is also raised as ``error``, with the dotted name in front.
    """
    try:
        return _Reader(error, cls, where).section(values, cls, where)
    except _Refusal as refusal:
        raise error(str(refusal)) from None


def check(config: Any, where: str = "config", error: type[Exception] = DataError) -> None:
    """``build``'s checks for a dataclass constructed directly: the first line of its ``__post_init__``."""
    reader, kinds = _Reader(error, type(config), where), kinds_of(type(config))
    try:
        for name, spec in fields_of(type(config)).items():
            value = reader.value(getattr(config, name), kinds[name], rule_of(spec), join(where, name))
            object.__setattr__(config, name, value)
    except _Refusal as refusal:
        raise error(str(refusal)) from None


def to_dict(config: Any) -> Any:
    """``config`` in plain JSON types, from which ``build`` makes an equal config."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {name: to_dict(getattr(config, name)) for name in fields_of(type(config))}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    return [to_dict(item) for item in config] if isinstance(config, (list, tuple)) else config


class _Refusal(Exception):
    """A value cannot be used. ``vague_at``: the dotted name of a value for which no more is known than that."""

    def __init__(self, message: str, vague_at: str | None = None):
        super().__init__(message)
        self.vague_at = vague_at


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes values of annotated types; raises _Refusal.

    Attributes:
      error: what ``__post_init__`` raises.
      root, where: the top-level config and its name, for hints.
    """

    error: type[Exception]
    root: type
    where: str

    @property
    def names(self) -> list[str]:
        return dotted_names(self.root, self.where)

    def section(self, values: Any, cls: type[T], where: str) -> T:
        values = _plain(values, where)
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            _refuse(values, where, words(cls))
        fields, kinds = fields_of(cls), kinds_of(cls)
        for key in values:
            if key not in fields:
                raise _Refusal(f"{where or 'config'}: unknown key {show(key)}; {nearest_key(key, cls, self.names)}")
        for name, spec in fields.items():
            if name not in values and is_required(spec):
                raise _Refusal(f"{join(where, name)} is missing: it must be {words(kinds[name], rule_of(spec))}")
        made = {
            name: self.value(value, kinds[name], rule_of(fields[name]), join(where, name))
            for name, value in values.items()
        }
        try:
            return cls(**made)
        except (self.error, DataError) as error:
            raise _Refusal(_located(str(error), where, fields)) from error

    def part(self, values: Any, part: PartOf, where: str) -> dict[str, Any]:
        """The checked ``values`` of some fields; their content stays in plain types."""
        if not isinstance(values, Mapping):
            _refuse(values, where, words(Part[(part.section, *part.further)]))
        fields, kinds, made = fields_of(part.section), kinds_of(part.section), {}
        for key, value in values.items():
            value, inner = _plain(value, where), join(where, str(key))
            if key in part.further:
                made[key] = self.anything(value, inner)
                continue
            if key not in fields:
                raise _Refusal(
                    f"{where}: unknown key {show(key)}; {nearest_key(key, part.section, self.names, part.further)}"
                )
            section, many = section_of(kinds[key])
            if section and not many and isinstance(value, Mapping):
                made[key] = self.part(value, PartOf(section), inner)
            else:
                made[key] = to_dict(self.value(value, kinds[key], rule_of(fields[key]), inner))
        return made

    def value(self, value: Any, kind: Any, rule: Rule, where: str) -> Any:
        """``value`` as the type ``kind``."""
        origin, value = get_origin(kind), _plain(value, where)
        if kind is Any:
            return self.anything(value, where)
        if origin in (Union, UnionType):
            return self.union(value, kind, rule, where)
        if part := part_of(kind):
            return self.part(value, part, where)
        if dataclasses.is_dataclass(kind):
            return self.section(value, kind, where)
        if origin is Literal:
            return _choice(value, get_args(kind), where)
        if origin in (tuple, list):
            return self.items(value, kind, rule, where)
        if origin is not None and issubclass(origin, Mapping):
            return self.mapping(value, kind, rule, where)
        return _scalar(value, kind, rule, where)

    def union(self, value: Any, kind: Any, rule: Rule, where: str) -> Any:
        """The first option that accepts ``value``; its own message if it knows what is wrong, e.g. inside a section."""
        refusals = []
        for option in sorted(get_args(kind), key=lambda option: option is not NoneType):
            try:
                return self.value(value, option, rule, where)
            except _Refusal as refusal:
                refusals.append(refusal)
        for refusal in refusals:
            if refusal.vague_at != where:
                raise refusal
        _refuse(value, where, words(kind, rule))

    def items(self, values: Any, kind: Any, rule: Rule, where: str) -> Any:
        kinds, named, names = get_args(kind), is_named(get_args(kind)[0]), None
        if named and isinstance(values, Mapping):
            names, values = list(values), [_with_name(_plain(item, where), name) for name, item in values.items()]
        fixed = get_origin(kind) is tuple and kinds[-1] is not ...
        if not isinstance(values, (list, tuple)) or (fixed and len(values) != len(kinds)):
            _refuse(values, where, words(kind, rule))
        made = []
        for number, item in enumerate(values):
            name = item.get("name") if named and isinstance(item, Mapping) else names and names[number]
            inner = join(where, name if isinstance(name, str) else str(number))
            made.append(self.value(item, kinds[number if fixed else 0], rule, inner))
        return get_origin(kind)(made)

    def mapping(self, values: Any, kind: Any, rule: Rule, where: str) -> dict[str, Any]:
        if not isinstance(values, Mapping):
            _refuse(values, where, words(kind, rule))
        for key in values:
            if not isinstance(key, str):
                raise _Refusal(f"{where}: key {show(key)} must be a string")
            if rule.choices is not None and key not in rule.choices:
                raise _Refusal(f"{where}: unknown key {show(key)}; {did_you_mean(key, rule.choices)}")
        inner = dataclasses.replace(rule, choices=None)
        return {key: self.value(value, get_args(kind)[1], inner, join(where, key)) for key, value in values.items()}

    def anything(self, value: Any, where: str) -> Any:
        """``value`` in JSON types."""
        if isinstance(value, Mapping):
            return self.mapping(value, Mapping[str, Any], NO_RULE, where)
        if isinstance(value, (list, tuple)):
            return [self.value(item, Any, NO_RULE, join(where, str(number))) for number, item in enumerate(value)]
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(value, where, "a finite number")
        if not isinstance(value, (str, int, float, NoneType)):
            _refuse(value, where, words(Any))
        return value


def _with_name(item: Any, name: str) -> Any:
    return {"name": name, **item} if isinstance(item, Mapping) else item


def _scalar(value: Any, kind: Any, rule: Rule, where: str) -> Any:
    given = value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else value
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if good and kind in (int, float):
        good = (kind is int or math.isfinite(value)) and rule.allows(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        raise _Refusal(f"{where} is {show(value)}: it must be {words(kind, rule)} (write {show(int(value))})")
    elif kind is str and rule.choices is not None:
        return _choice(value, tuple(rule.choices), where)
    if not good:
        _refuse(given, where, words(kind, rule))
    return value


def _choice(value: Any, valid: tuple[Any, ...], where: str) -> Any:
    """``value`` if it is in ``valid``; None (which the command line makes of "none") is read as "none"."""
    if value is None and None not in valid and "none" in valid:
        return "none"
    for option in valid:
        if type(option) is type(value) and option == value:
            return value
    strings = [option for option in valid if isinstance(option, str)]
    if isinstance(value, str) and len(strings) == len(valid):
        raise _Refusal(f"{where} is {show(value)}: {did_you_mean(value, strings)}")
    _refuse(value, where, listed(valid))


def _plain(value: Any, where: str) -> Any:
    """A ConfigDict as a dict, a FieldReference's value, a NumPy scalar as Python's; other values unchanged."""
    name = type(value).__name__
    if name == "FieldReference":
        try:
            return _plain(value.get(), where)
        except Exception as error:  # ml_collections' RequiredValueError, or computing the value failed
            raise _Refusal(f"{where} has no value: {' '.join(str(error).split())}") from error
    if name in ("ConfigDict", "FrozenConfigDict"):
        return dict(value._fields)  # as written: its own items() are sorted
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def _refuse(value: Any, where: str, expected: str) -> NoReturn:
    raise _Refusal(f"{where or 'config'} is {show(value)}: it must be {expected}", vague_at=where)


def _located(message: str, where: str, fields: Collection[str]) -> str:
    """``message`` of a section's ``__post_init__`` with the dotted name ``where`` in front, unless already there."""
    parts = where.split(".") if where else []
    for start in range(len(parts)):
        if message.startswith(tuple(f"{'.'.join(parts[start:])}{end}" for end in (".", " ", ":", "["))):
            return ".".join([*parts[:start], message])
    first = message.split(" ")[0].rstrip(":,")
    if first.split(".")[0].split("[")[0] in fields:
        return join(where, message)
    return f"{where}: {message}" if where else message
