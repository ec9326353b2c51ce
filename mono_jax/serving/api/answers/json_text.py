"""JSON whose large parts have been written before."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


class Json(str):
    """A text that is JSON already."""


def dumps(value: Any) -> str:
    """Compact JSON of ``value``, in which each ``Json`` stands as it is."""
    if isinstance(value, Json):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{plain(name)}:{dumps(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return plain(value)


def plain(value: Any) -> str:
    """Compact JSON of ``value``; raises ValueError for infinity and NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_response(value: Any) -> Response:
    """``value``, as ``dumps`` writes it."""
    return Response(dumps(value), media_type="application/json")
