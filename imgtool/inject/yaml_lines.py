"""YAML with line numbers: plain data, and where each part of it was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from imgtool.errors import ImgtoolError, UsageError

# Where a value is: the keys and indices that lead to it.
YamlPath = tuple[str | int, ...]
LARGEST = 4 << 20
# Aliases of aliases multiply.
_MOST_VALUES = 100_000


class Lines:
    """The data of a YAML file, and the line of each value, counted from 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[YamlPath, int] = {}
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ImgtoolError(f"cannot be read: {error.strerror}", subject=path) from error
        if len(raw) > LARGEST:
            raise UsageError(f"the spec is longer than {LARGEST} bytes", subject=path)
        self._loader = yaml.SafeLoader("")
        try:
            node = yaml.compose(raw, Loader=yaml.SafeLoader)
            self.data: Any = None if node is None else self._value(node, ())
        except yaml.YAMLError as error:
            raise _explain(path, error) from error

    def where(self, place: YamlPath) -> str:
        """`FILE:LINE` of a value, or of the nearest one above it."""
        while place not in self._lines and place:
            place = place[:-1]
        return f"{self.path}:{self._lines.get(place, 1)}"

    def _value(self, node: yaml.Node, place: YamlPath) -> object:
        self._lines.setdefault(place, node.start_mark.line + 1)
        if len(self._lines) > _MOST_VALUES:
            raise UsageError("the spec has too many values", subject=self.path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(one, (*place, n)) for n, one in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        kind = node.tag.rpartition(":")[2]
        # 0644 is a mode and not 420, and a date is what was typed.
        if kind == "timestamp" or (kind == "int" and node.value.lstrip("+-").startswith("0")):
            return int(node.value) if node.value == "0" else node.value
        return self._loader.construct_object(node, deep=True)

    def _mapping(self, node: yaml.MappingNode, place: YamlPath) -> dict[str, object]:
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            # Network configurations have keys such as 1; they are names here.
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in found:
                raise UsageError(f"{self.path}:{line}: '{key}' is there twice")
            here = (*place, key)
            self._lines[here] = line
            found[key] = self._value(value_node, here)
        return found


def _explain(path: Path, error: yaml.YAMLError) -> UsageError:
    mark = getattr(error, "problem_mark", None)
    line = 1 if mark is None else mark.line + 1
    said = getattr(error, "problem", None) or str(error).splitlines()[0]
    return UsageError(f"{path}:{line}: not YAML: {said}")


def mapping_of(raw: bytes) -> Mapping[str, object] | None:
    """The mapping that some YAML text is; None if it is something else.

    Raises `UsageError`, with the line, for what is no YAML.
    """
    try:
        data = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise UsageError(f"not YAML{where}: {getattr(error, 'problem', error)}") from error
    return data if isinstance(data, dict) else None
