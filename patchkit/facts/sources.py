"""From the bytes of a fact file, or from objects in memory, to single records with their lines."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.errors import InputError
from patchkit.facts.record import Refused
from patchkit.facts.schema import Fact


@dataclass(frozen=True)
class Entry:
    """One record as found: its place in words, its line, its text, and its value (a Refused where it has none)."""

    where: str
    line: int
    raw: str
    value: object


def file_entries(path: str | Path) -> tuple[str, Iterator[Entry]]:
    """The name of a file in messages, and its records: one JSON object a line, or one array; "-" is standard input.

    Raises:
        InputError: the file cannot be read at all.
    """
    name = "<stdin>" if str(path) == "-" else str(Path(path))
    data = sys.stdin.buffer.read() if name == "<stdin>" else _read_bytes(Path(path), name)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: is UTF-16, not UTF-8; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    return name, _array_entries(data, name) if data.lstrip()[:1] == b"[" else _line_entries(data)


def object_entries(records: Iterable[Mapping[str, Any] | Fact]) -> Iterator[Entry]:
    """Records in memory; `line` is the index, from 0."""
    for index, record in enumerate(records):
        value = record.model_dump() if isinstance(record, Fact) else record
        yield Entry(f"facts[{index}]", index, json.dumps(value, ensure_ascii=False, default=str, skipkeys=True), value)


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f'{name}: no such file; check the path, or use "-" for standard input') from None
    except IsADirectoryError:
        raise InputError(f"{name}: is a directory; name a fact file in it") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check its permissions") from error


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


def _array_entries(data: bytes, name: str) -> Iterator[Entry]:
    # The whole array is known to be sound here; the second pass only finds where each record starts.
    text = _array_text(data, name)
    decoder = json.JSONDecoder()
    end, line, number = 0, 1, 0
    start = _next_record(text, text.index("[") + 1)
    while text[start] != "]":
        number += 1
        line += text.count("\n", end, start)
        value, end = decoder.raw_decode(text, start)
        yield Entry(f"line {line} (record {number})", line, text[start:end], value)
        line += text.count("\n", start, end)
        start = _next_record(text, end)


def _array_text(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8")
        json.loads(text)
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise InputError(f"{name} line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        where = f"{name} line {error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        raise InputError(
            f"{where}: not JSON ({_json_fault(error)}); nothing in an array can be read past such a mistake: mend it, "
            "or put one object a line"
        ) from None
    return text


def _next_record(text: str, position: int) -> int:
    while text[position] in " \t\r\n,":
        position += 1
    return position


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
