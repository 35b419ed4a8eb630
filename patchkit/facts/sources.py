"""Where records come from: files of several kinds, compressed or on the Hub, and objects in memory.

JSON is told from the rest by its first character and needs no name; CSV, TSV and YAML are known by the file's ending.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from patchkit.errors import InputError
from patchkit.facts.containers import Entry, json_entries, table_entries
from patchkit.facts.schema import Fact
from patchkit.facts.yaml_records import yaml_entries

HUB = "hf://datasets/"


def file_entries(path: str | Path) -> tuple[str, Iterator[Entry], str]:
    """The name of a file in messages, its records, and the sha256 of its bytes; "-" is standard input, and a name may
    be on the Hub.

    Raises:
        InputError: the file cannot be read at all.
    """
    name = "<stdin>" if str(path) == "-" else str(path) if str(path).startswith(HUB) else str(Path(path))
    data = sys.stdin.buffer.read() if name == "<stdin>" else _read_bytes(_local(name), name)
    digest = hashlib.sha256(data).hexdigest()
    if data.startswith(b"\x1f\x8b"):
        data = _unzipped(data, name)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: is UTF-16, not UTF-8; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    ending = PurePosixPath(name.removesuffix(".gz")).suffix.lower()
    if ending in (".csv", ".tsv"):
        return name, table_entries(data, name, "," if ending == ".csv" else "\t"), digest
    return name, (yaml_entries if ending in (".yaml", ".yml") else json_entries)(data, name), digest


def object_entries(records: Iterable[Mapping[str, Any] | Fact]) -> Iterator[Entry]:
    """Records in memory; `line` is the index, from 0."""
    for index, record in enumerate(records):
        value = record.model_dump(exclude_defaults=True) if isinstance(record, Fact) else record
        yield Entry(f"facts[{index}]", index, json.dumps(value, ensure_ascii=False, default=str, skipkeys=True), value)


def _local(name: str) -> Path:
    """The file itself: of hf://datasets/ORG/NAME[@REVISION]/PATH, the one in the Hub's cache."""
    if not name.startswith(HUB):
        return Path(name)
    from huggingface_hub import hf_hub_download

    from patchkit.io.hub import ask_once, hub_errors

    owner, _, rest = name.removeprefix(HUB).partition("/")
    dataset, _, file = rest.partition("/")
    dataset, _, revision = dataset.partition("@")
    if not (owner and dataset and file):
        raise InputError(f"{name}: names no file; write {HUB}ORG/NAME/FILE, or {HUB}ORG/NAME@REVISION/FILE")
    repo = f"{owner}/{dataset}"
    ask_once(repo, file, repo_type="dataset", revision=revision or None)
    with hub_errors(repo):
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision or None))


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f'{name}: no such file; check the path, or use "-" for standard input') from None
    except IsADirectoryError:
        raise InputError(f"{name}: is a directory; name a fact file in it") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check its permissions") from error


def _unzipped(data: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name}: cannot be unpacked ({error}); pack it anew with gzip") from None
