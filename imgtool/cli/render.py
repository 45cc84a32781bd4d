"""The only printer: rows as a table, JSON, JSON lines or CSV; names made safe for a terminal."""

from __future__ import annotations

import base64
import csv
import datetime
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from imgtool.cli.output import Output

if TYPE_CHECKING:
    from imgtool.formats.xattrs import Xattrs

Row = Mapping[str, object]

_LONGEST_LINE = 4000  # characters, of messages

_ESCAPES = {7: "a", 8: "b", 9: "t", 10: "n", 11: "v", 12: "f", 13: "r", 0x5C: "\\"}


def escape(name: bytes) -> str:
    """A name as `ls -b` shows it: what is not printable is a C escape or three octal digits."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = name.decode("utf-8", "surrogateescape")
    if text.isprintable() and " " not in text and "\\" not in text:
        return text  # nearly every name
    shown = []
    for character in text:
        code = ord(character)
        if code in _ESCAPES:
            shown.append("\\" + _ESCAPES[code])
        elif character == " ":
            shown.append("\\ ")
        elif 0xDC80 <= code <= 0xDCFF:
            shown.append(f"\\{code - 0xDC00:03o}")
        elif character.isprintable():
            shown.append(character)
        else:
            # isprintable() is False for controls, direction overrides and their like.
            shown.extend(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogatepass"))
    return "".join(shown)


def plain(text: str) -> str:
    """Text from a guest with nothing in it that steers a terminal; spaces stay."""
    return escape(text.encode("utf-8", "surrogateescape")).replace("\\ ", " ")


def timestamp(nanoseconds: int) -> str:
    """ISO 8601 UTC with nanoseconds."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    epoch = datetime.datetime(1970, 1, 1)
    try:
        moment = epoch + datetime.timedelta(seconds=seconds)
    except OverflowError:
        # A hostile or damaged inode: the nearest moment that can be written.
        moment = datetime.datetime.max if seconds > 0 else datetime.datetime.min
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z".rjust(30, "0")


def human(size: int) -> str:
    """A size as `ls -h` writes it: powers of 1024, rounded up."""
    if size < 1024:
        return str(size)
    units = "KMGTPE"
    exponent = 0
    unit = 1024
    while exponent < len(units) - 1 and size >= unit * 1024:
        unit *= 1024
        exponent += 1
    tenths = -(-size * 10 // unit)
    if tenths >= 100:
        whole = -(-size // unit)
        if whole >= 1024 and exponent < len(units) - 1:
            return f"1.0{units[exponent + 1]}"
        return f"{whole}{units[exponent]}"
    return f"{tenths // 10}.{tenths % 10}{units[exponent]}"


def name_fields(key: str, name: bytes) -> dict[str, str]:
    """A name for JSON: `key`, and `key_bytes` in base64 if it is not UTF-8."""
    try:
        return {key: name.decode("utf-8")}
    except UnicodeDecodeError:
        return {
            key: name.decode("utf-8", "replace"),
            f"{key}_bytes": base64.b64encode(name).decode("ascii"),
        }


def attributes(xattrs: Xattrs | None, output: Output) -> list[object] | None:
    """Extended attributes in a row: for JSON of each the `name` and the `value`, or its
    `value_bytes` in base64 if it is no text; for CSV as `attribute` shows them.
    """
    if xattrs is None:
        return None
    if output is Output.csv:
        return [attribute(name, value) for name, value in xattrs]
    return [{**name_fields("name", name), **_value(value)} for name, value in xattrs]


def _value(value: bytes) -> dict[str, str | None]:
    if _text(value) is not None:
        return {"value": value.decode()}
    return {"value": None, "value_bytes": base64.b64encode(value).decode("ascii")}


def _text(value: bytes) -> str | None:
    """The text of a value, without the NUL that SELinux puts after it; None for what is none."""
    try:
        text = value.removesuffix(b"\0").decode()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None


def attribute(name: bytes, value: bytes) -> str:
    """An extended attribute as getfattr(1) shows it: text in quotes, all else in base64 after
    `0s`; ACLs as in acl(5), on one line.
    """
    from imgtool.formats.xattrs import ACLS, acl_text

    shown = acl_text(value) if name in ACLS else None
    if shown is not None:
        return f"{escape(name)}={shown.rstrip().replace(chr(10), ',')}"
    text = _text(value)
    if text is None:
        return f"{escape(name)}=0s{base64.b64encode(value).decode('ascii')}"
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'{escape(name)}="{quoted}"'


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, (list, tuple)):
        return plain(",".join(map(str, value))) or "-"
    return plain(str(value))


def table(
    rows: Iterable[Row], columns: Sequence[str], titles: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Lines of a table with aligned columns; numbers stand to the right."""
    held = [[row.get(column) for column in columns] for row in rows]
    heads = [(titles or {}).get(column, column).upper() for column in columns]
    cells = [[_cell(value) for value in row] for row in held]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    right = [
        any(type(row[i]) is int for row in held)
        or columns[i] in ("size", "used", "available", "use%", "start", "end")
        for i in range(len(columns))
    ]
    for line in [heads, *cells]:
        yield "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()


def _csv_cell(value: object, *, for_a_terminal: bool) -> object:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    return plain(value) if for_a_terminal and isinstance(value, str) else value


def emit(
    rows: Iterable[Row],
    fields: Sequence[str],
    output: Output,
    *,
    columns: Sequence[str] | None = None,
    shown: Iterable[Row] | None = None,
    titles: Mapping[str, str] | None = None,
) -> None:
    """Write rows in the form asked for; JSON, JSON lines and CSV are streamed.

    CSV has names as they are, but on a terminal, which they could steer, as tables have them.
    `columns` are the table's, `shown` the rows for a table where they differ (human sizes).
    """
    out = sys.stdout
    if output is Output.table:
        for line in table(rows if shown is None else shown, columns or fields, titles):
            out.write(line + "\n")
    elif output is Output.csv:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(fields)
        on_terminal = out.isatty()
        for row in rows:
            writer.writerow([_csv_cell(row.get(f), for_a_terminal=on_terminal) for f in fields])
            out.write(buffer.getvalue())
            buffer.seek(0)
            buffer.truncate()
        out.write(buffer.getvalue())
    elif output is Output.jsonl:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=True) + "\n")
    else:
        out.write("[")
        for number, row in enumerate(rows):
            out.write(("," if number else "") + "\n  " + json.dumps(row, ensure_ascii=True))
        out.write("\n]\n")
    out.flush()


def text(content: str) -> None:
    """Lines on stdout that are no rows; names in them were made safe by `plain`."""
    sys.stdout.write(content)


def message(kind: str, text: str) -> None:
    """A line on stderr: `imgtool: error: ...`."""
    print(f"imgtool: {kind}: {_bound(plain(text))}", file=sys.stderr, flush=True)


def hint(text: str) -> None:
    """What can be done, on stderr, below an error."""
    print(f"  hint: {_bound(plain(text))}", file=sys.stderr, flush=True)


def _bound(line: str) -> str:
    """No line fills a terminal; names are whole where they are of any usual length."""
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 4] + " ..."
