"""The forms of the rows that commands list."""

from __future__ import annotations

from enum import StrEnum


class Output(StrEnum):
    """How a command that lists writes its rows."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
