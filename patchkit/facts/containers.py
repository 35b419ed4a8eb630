"""What files are made of: JSON by the line or as a whole, and tables; each taken apart into records with lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from patchkit.errors import InputError
from patchkit.facts.record import Refused
from patchkit.words import counted

LISTS = ("facts", "data")  # fields of an object that holds all records


@dataclass(frozen=True)
class Entry:
    """One record as found: its place in words, its line, its text, and its value (a Refused where it has none)."""

    where: str
    line: int
    raw: str
    value: object


def decoded(data: bytes, name: str) -> str:
    """The text of a file.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise InputError(f"{name} line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8") from None


# --- JSON -------------------------------------------------------------------------------------------------------------


def json_entries(data: bytes, name: str) -> Iterator[Entry]:
    """One object a line; or one array, one object that holds all records, or objects over several lines."""
    first = data.lstrip()[:1]
    if first == b"[":
        text = _sound(decoded(data, name), name)
        yield from _array_entries(text, text.index("[") + 1)
    elif first == b"{" and (objects := _spread_objects(data)) is not None:
        text = data.decode("utf-8")
        for start, end, value in objects:
            yield from _unpacked(text, start, end, value)
    else:
        yield from _line_entries(data)


def _line_entries(data: bytes) -> Iterator[Entry]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            raw = line.decode("utf-8", "replace").strip()
            yield Entry(f"line {number}", number, raw, _line_value(line.strip()))


def _line_value(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Refused(None, f"not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return Refused(None, f"not JSON ({_json_fault(error)}); a line must be one whole JSON object")


def _spread_objects(data: bytes) -> list[tuple[int, int, object]] | None:
    """Objects and their places in a text that is not one object a line; None if it is, or if it is broken."""
    try:
        text = data.decode("utf-8")
        decoder, position, found = json.JSONDecoder(), 0, list[tuple[int, int, object]]()
        while (position := _skipped(text, position)) < len(text):
            value, end = decoder.raw_decode(text, position)
            found.append((position, end, value))
            position = end
    except (ValueError, RecursionError):
        return None
    holds = len(found) == 1 and _holding(found[0][2])
    return found if holds or any("\n" in text[start:end] for start, end, _ in found) else None


def _holding(value: object) -> str | bool:
    """The field in which an object holds all records, or whether it holds them by their ids."""
    if not isinstance(value, Mapping) or not value:
        return False
    name = next((name for name in LISTS if isinstance(value.get(name), list)), None)
    return name or all(isinstance(one, Mapping) and "edit" in one for one in value.values())


def _unpacked(text: str, start: int, end: int, value: object) -> Iterator[Entry]:
    line = 1 + text.count("\n", 0, start)
    held = _holding(value)
    if not held or not isinstance(value, Mapping):
        yield Entry(f"line {line}", line, text[start:end], value)
    elif isinstance(held, str):
        yield from _array_entries(text, _members(text, start)[held] + 1)
    else:
        for name, record in value.items():
            yield Entry(f"record {name}", line, json.dumps(record, ensure_ascii=False), {"id": name, **record})


def _members(text: str, start: int) -> dict[str, int]:
    """Where the value of each field of the sound object at `start` begins; of a name that comes twice, the last one's,
    which is the one that JSON reads."""
    decoder, found = json.JSONDecoder(), dict[str, int]()
    position = _skipped(text, start + 1)
    while text[position] != "}":
        name, end = decoder.raw_decode(text, position)
        found[name] = _skipped(text, text.index(":", end) + 1)
        position = _skipped(text, decoder.raw_decode(text, found[name])[1])
    return found


def _array_entries(text: str, start: int) -> Iterator[Entry]:
    """The records of an array that is known to be sound, whose first one begins at `start` or after."""
    decoder = json.JSONDecoder()
    end, line, number = 0, 1, 0
    start = _skipped(text, start)
    while text[start] != "]":
        number += 1
        line += text.count("\n", end, start)
        value, end = decoder.raw_decode(text, start)
        yield Entry(f"line {line} (record {number})", line, text[start:end], value)
        line += text.count("\n", start, end)
        start = _skipped(text, end)


def _sound(text: str, name: str) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{name} line {error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        raise InputError(
            f"{where}: not JSON ({_json_fault(error)}); nothing in an array can be read past such a mistake: mend it, "
            "or put one object a line"
        ) from None
    return text


def _skipped(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"


# --- tables -----------------------------------------------------------------------------------------------------------


def table_entries(data: bytes, name: str, separator: str) -> Iterator[Entry]:
    """Rows of a table whose first row names the fields; a cell that begins as a JSON list or object is one.

    Raises:
        InputError: it is no table.
    """
    reader = csv.reader(io.StringIO(decoded(data, name), newline=""), delimiter=separator)
    head: list[str] | None = None
    line = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{name} line {reader.line_num}: not a table ({error}); save it as CSV anew") from None
        if row is None:
            return
        if head is None:
            head = [field.strip() for field in row]
        elif any(cell.strip() for cell in row):
            yield _row(head, row, line)
        line = reader.line_num + 1


def _row(head: list[str], row: list[str], line: int) -> Entry:
    raw = json.dumps(dict(zip(head, row, strict=False)), ensure_ascii=False)
    if len(row) > len(head):
        more = f"has {counted(len(row), 'cell')}, but the first row names {len(head)}"
        more += "; put quotes around cells with separators"
        return Entry(f"line {line}", line, raw, Refused(None, more))
    cells = {field: _cell(cell) for field, cell in zip(head, row, strict=False) if field and cell.strip()}
    return Entry(f"line {line}", line, raw, cells)


def _cell(cell: str) -> object:
    if cell.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell
