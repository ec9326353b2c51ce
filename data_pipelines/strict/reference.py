"""The differences between two configs, and the reference of all settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_origin

from data_pipelines.strict.fields import (
    OnResume,
    Part,
    default_of,
    fields_of,
    is_named,
    is_required,
    join,
    kinds_of,
    part_of,
    rule_of,
    section_of,
    words,
)
from data_pipelines.strict.reader import to_dict


class Change(NamedTuple):
    """One difference between two configs; an absent value is None."""

    key: str
    old: Any
    new: Any
    on_resume: OnResume


def changes(old: Mapping[str, Any], new: Mapping[str, Any], cls: type) -> list[Change]:
    """The differences between two configs of ``cls`` in ``to_dict``'s form; an absent key has its default."""
    return list(_differences(old, new, cls, "", "fixed"))


def _differences(old: Any, new: Any, kind: Any, key: str, on_resume: OnResume) -> Iterator[Change]:
    if old == new:
        return
    part = part_of(kind)
    section, many = (part.section, False) if part else section_of(kind)
    if many and isinstance(old, list) and isinstance(new, list) and is_named(section):
        by_name = [{item.get("name"): item for item in items if isinstance(item, Mapping)} for items in (old, new)]
        if by_name[0] != by_name[1]:  # else only the order differs
            old, new = by_name
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        yield Change(key, old, new, on_resume)
        return
    fields = fields_of(section) if section and not many else {}
    for name in {**old, **new}:
        inner, mark, default = (section if many else Any), on_resume, None
        if name in fields:
            inner = kinds_of(section)[name]
            if not part:
                default = to_dict(default_of(fields[name]))
            elif section_of(inner)[0] and not section_of(inner)[1]:
                inner = Part[section_of(inner)[0]]
            mark = "free" if on_resume == "free" else rule_of(fields[name]).on_resume
        yield from _differences(old.get(name, default), new.get(name, default), inner, join(key, name), mark)


class Row(NamedTuple):
    """One field in the reference, in words; a section has no ``default``, and its fields follow."""

    key: str
    type: str
    default: str
    limits: str
    help: str
    on_resume: OnResume
    section: bool = False


def reference(cls: type, prefix: str = "", on_resume: OnResume = "fixed") -> Iterator[Row]:
    """All fields of ``cls`` and of the dataclasses inside; NAME or NUMBER stands for the key of an item."""
    for name, spec in fields_of(cls).items():
        rule, kind, key = rule_of(spec), kinds_of(cls)[name], join(prefix, name)
        mark = "free" if on_resume == "free" else rule.on_resume
        section, many = section_of(kind)
        default = "required" if is_required(spec) else repr(to_dict(default_of(spec)))
        if section:
            default = default if default in ("required", "None") else ""
        choices = ", ".join(repr(choice) for choice in rule.choices or ())
        limits = "; ".join(part for part in (rule.limits, choices) if part)
        yield Row(key, words(kind, brief=True), default, limits, rule.help, mark, bool(section))
        if section:
            item = f"{key}.{'NAME' if is_named(section) or get_origin(kind) not in (tuple, list) else 'NUMBER'}"
            yield from reference(section, item if many else key, mark)
