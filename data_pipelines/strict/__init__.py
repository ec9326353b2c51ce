"""Conversion from a mapping (a config file, JSON, the command line) to a frozen dataclass, and back.

A config is a frozen dataclass whose fields are made by ``field``, which states their meaning, their range and whether a
resumed run may change them:

    @dataclasses.dataclass(frozen=True)
    class MeshConfig:
        data: int = field(-1, ge=-1, help="devices along ``data``; -1 = all that remain", on_resume="free")

``build(MeshConfig, {"data": 2})`` checks the values and makes a config, ``to_dict`` is its inverse, ``changes``
compares two configs as mappings, and ``reference`` lists all settings. Types come from the annotations:

    int (not bool), float (an int is accepted, NaN and infinity are not), bool (only True and False), str, None, Any
    (plain JSON values), Literal, unions, tuple[T, ...], tuple[T, U], list[T], Mapping[str, T], dataclasses, and
    Part[dataclass], a mapping with some of its keys

ml_collections' ConfigDict and FieldReference and NumPy scalars are treated as the plain values that they hold.
"""

from data_pipelines.strict.fields import Part, field
from data_pipelines.strict.reader import build, check, to_dict
from data_pipelines.strict.reference import Change, Row, changes, reference

__all__ = ["Change", "Part", "Row", "build", "changes", "check", "field", "reference", "to_dict"]
