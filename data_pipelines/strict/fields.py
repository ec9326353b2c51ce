"""The fields of a config: the rules for each, and their types in words."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from data_pipelines.errors import did_you_mean

OnResume = Literal["fixed", "free"]
_RULE = "strict"  # key of a field's metadata
_LONGEST = 60  # characters of a value in a message


@dataclasses.dataclass(frozen=True)
class Rule:
    """The rules that ``field`` sets for a field beyond its type: see there."""

    help: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: Collection[Any] | None = None
    on_resume: OnResume = "fixed"

    def allows(self, number: float) -> bool:
        return (
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
        )

    @property
    def limits(self) -> str:
        """ "above 0 and at most 1"; "" = no limits."""
        limits = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)


NO_RULE = Rule()


def field(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Callable[[], Any] | Any = dataclasses.MISSING,
    help: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Collection[Any] | None = None,
    on_resume: OnResume = "fixed",
) -> Any:
    """A field of a config; without ``default`` and ``default_factory`` it is required.

    Args:
      help: its meaning, for the reference; units included.
      ge, gt, le, lt: limits of the field's numbers (>=, >, <=, <), those inside a list or mapping included.
      choices: the strings that it may be; for a mapping: the keys that it may have.
      on_resume: "free" = a resumed run may change it; for a section: everything inside.
    """
    rule = Rule(help, ge, gt, le, lt, choices, on_resume)
    return dataclasses.field(default=default, default_factory=default_factory, metadata={_RULE: rule})


@dataclasses.dataclass(frozen=True)
class PartOf:
    """``section``: the dataclass. ``further``: keys that are allowed beside its own."""

    section: type
    further: tuple[str, ...] = ()


class Part:
    """``Part[Cls]`` annotates a mapping with some keys of the dataclass ``Cls``, such as changes of a preset.

    Keys and values are checked like those of ``Cls``, sections inside are parts as well, and the value stays a mapping.
    ``Changes = Part[Cls, "preset"]`` may also have the key "preset", with any plain value.
    """

    def __class_getitem__(cls, section: type | tuple[Any, ...]) -> Any:
        section, *further = section if isinstance(section, tuple) else (section,)
        return Annotated[Mapping[str, Any], PartOf(section, tuple(further))]


def part_of(kind: Any) -> PartOf | None:
    """The dataclass (with further keys) of a ``Part``; None for other types."""
    if get_origin(kind) is Annotated and isinstance(get_args(kind)[1], PartOf):
        return get_args(kind)[1]
    return None


@functools.cache
def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    """{name: field} of the constructor's arguments."""
    return {spec.name: spec for spec in dataclasses.fields(cls) if spec.init}


@functools.cache
def kinds_of(cls: type) -> dict[str, Any]:
    """{field: annotated type}."""
    return get_type_hints(cls, include_extras=True)


def rule_of(spec: dataclasses.Field) -> Rule:
    return spec.metadata.get(_RULE, NO_RULE)


def default_of(spec: dataclasses.Field) -> Any:
    """The field's default; None if it is required."""
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return None if spec.default is dataclasses.MISSING else spec.default


def is_required(spec: dataclasses.Field) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def is_named(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and "name" in fields_of(kind)


def section_of(kind: Any) -> tuple[type | None, bool]:
    """The dataclass in ``kind`` if there is one (not a ``Part``), and whether ``kind`` holds many of it."""
    if part_of(kind):
        return None, False
    if dataclasses.is_dataclass(kind):
        return kind, False
    origin, inside = get_origin(kind), [section_of(option) for option in get_args(kind)]
    many = origin not in (None, Union, UnionType, Literal)
    return next(((section, many or deep) for section, deep in inside if section), (None, False))


def nearest_key(key: object, cls: type, others: Collection[str], further: Collection[str] = ()) -> str:
    """ "did you mean 'x'?" for a key that ``cls`` lacks, where 'x' may be from ``others``; else the valid keys."""
    if elsewhere := next((name for name in others if name.rpartition(".")[2] == key), None):
        return f"did you mean '{elsewhere}'?"
    return did_you_mean(key if isinstance(key, str) else show(key), (*fields_of(cls), *further))


def dotted_names(cls: type, where: str) -> list[str]:
    """The dotted names of all fields in ``cls`` and its sections, below ``where``."""
    names = []
    for name, kind in kinds_of(cls).items():
        section, many = section_of(kind)
        inner = join(where, name)
        names += dotted_names(section, inner) if section and not many else [inner]
    return names


def join(where: str, name: str) -> str:
    """The dotted name of ``name`` in ``where``."""
    safe = name if name.isprintable() else repr(name)
    return f"{where}.{safe}" if where else safe


def show(value: Any) -> str:
    """``value`` on one line, shortened if it is long."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an int of thousands of digits, a list inside itself
        text = f"of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def listed(options: Collection[Any]) -> str:
    """ "'a', 'b' or 'c'"."""
    *most, last = [repr(option) for option in options]
    return f"{', '.join(most)} or {last}" if most else last


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    NoneType: "None",
    Any: "a plain value (None, True, False, a number, a string, a list or a mapping)",
}


def words(kind: Any, rule: Rule = NO_RULE, brief: bool = False) -> str:
    """A description of ``kind`` in words; ``brief``: without limits, choices and the keys of sections."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any and brief:
        return "any plain value"
    if kind in _NAMES:
        if kind is str and rule.choices is not None and not brief:
            return listed(rule.choices)
        limits = rule.limits if kind in (int, float) and not brief else ""
        return f"{_NAMES[kind]}, {limits}" if limits else _NAMES[kind]
    if part := part_of(kind):
        keys = f"keys of {part.section.__name__}" if brief else ", ".join((*part.further, *fields_of(part.section)))
        return f"a mapping with {keys}" if brief else f"a mapping with some of the keys {keys}"
    if dataclasses.is_dataclass(kind):
        return "a section" if brief else f"a mapping with keys {', '.join(fields_of(kind))}"
    if origin is Literal:
        return listed(args)
    if origin in (Union, UnionType):
        options = sorted(args, key=lambda option: option is not NoneType)
        return " or ".join(words(option, rule, brief) for option in options)
    if origin in (tuple, list):
        if origin is tuple and args[-1] is not ...:
            return f"a list of {len(args)} ({', '.join(words(item, rule, brief) for item in args)})"
        return f"a list (each item {words(args[0], rule, brief)})"
    if origin is not None and issubclass(origin, Mapping):
        keys = f" with keys {listed(rule.choices)}" if rule.choices is not None and not brief else ""
        inner = dataclasses.replace(rule, choices=None)
        return f"a mapping{keys}" + ("" if args[1] is Any else f" (each value {words(args[1], inner, brief)})")
    raise TypeError(f"{kind!r}: strict does not support this type")
