"""Whatever a fact file holds, reading it ends in facts or in one clear refusal, never in a traceback."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from patchkit.errors import InputError
from patchkit.facts.checks import Check
from patchkit.facts.limits import Limits, fitting
from patchkit.facts.reader import parse_facts, read_facts, write_rejected
from patchkit.facts.schema import FactFile
from patchkit.model.loading import load_config, load_tokenizer
from tests.formats import CHAT, SAMPLES

USUAL = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)
FACTWORLD = Path(__file__).parents[1] / "examples" / "factworld"
PARTS, PART = 50, 2_000


def names(value: Any) -> Iterator[str]:
    """Every field name in a record, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from names(inner)
    elif isinstance(value, list):
        for item in value:
            yield from names(item)


FIELDS = sorted(
    {name for record in SAMPLES.values() for name in names(record)} | {"edit", "facts", "data", "separator"}
)
TEXTS = st.text(max_size=12) | st.sampled_from(["Ada Berg", "{}", " ", "", "\ud83d", "李娜", "<|endoftext|>", "\u2028"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def records(draw: st.DrawFn) -> Any:
    """A record of some format with a few of its values, at any depth, replaced, dropped or added."""
    record = json.loads(json.dumps(draw(st.sampled_from(list(SAMPLES.values())))))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = record
        while isinstance(place, (dict, list)) and place and draw(st.booleans()):
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)):
                break
            place = place[key]
        if isinstance(place, dict):
            name = draw(st.sampled_from([*place, *FIELDS]))
            if draw(st.booleans()):
                place.pop(name, None)
            else:
                place[name] = draw(VALUES)
        elif isinstance(place, list):
            place.append(draw(VALUES))
    return record if draw(st.integers(0, 9)) else draw(VALUES)


def table(rows: list[Any], separator: str) -> str:
    out = io.StringIO()
    kept = [row for row in rows if isinstance(row, dict)]
    head = sorted({str(name) for row in kept for name in row})
    writer = csv.writer(out, delimiter=separator)
    writer.writerow(head)
    for row in kept:
        cells = {str(name): value for name, value in row.items()}
        writer.writerow(
            [cells[n] if isinstance(cells.get(n), str) else json.dumps(cells[n]) if n in cells else "" for n in head]
        )
    return out.getvalue()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of such records of any kind, sometimes with bytes broken, and sometimes packed."""
    rows = draw(st.lists(records(), max_size=3))
    kind = draw(st.sampled_from(["jsonl", "json", "pretty", "object", "ids", "csv", "tsv", "yaml", "bytes"]))
    text = {
        "jsonl": lambda: "\n".join(json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows),
        "json": lambda: json.dumps(rows, indent=draw(st.sampled_from([None, 1]))),
        "pretty": lambda: "\n".join(json.dumps(row, indent=2) for row in rows),
        "object": lambda: json.dumps({draw(st.sampled_from(["facts", "data"])): rows, "x": draw(VALUES)}),
        "ids": lambda: json.dumps({str(i): row for i, row in enumerate(rows)}),
        "csv": lambda: table(rows, ","),
        "tsv": lambda: table(rows, "\t"),
        "yaml": lambda: json.dumps(rows),
        "bytes": lambda: draw(st.text()),
    }[kind]()
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3)) if draw(st.booleans()) else 0):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(
            st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"]", b"\n"])
        )
    name = f"facts.{kind}" if kind in ("csv", "tsv", "yaml") else "facts.json"
    whole = bytes(data)
    return (f"{name}.gz", gzip.compress(whole)) if draw(st.integers(0, 19)) == 0 else (name, whole)


def tried(read: Callable[[], FactFile]) -> tuple[FactFile | None, str]:
    """What was read, or why nothing was."""
    try:
        return read(), ""
    except InputError as error:
        return None, str(error)


def read_anything(
    folder: Path, name: str, data: bytes, skip_bad: bool, needs_subject: bool, check: Check | None = None
) -> str:
    """Reads the file as `apply` does; how that ended, for counting."""
    path = folder / name
    path.write_bytes(data)
    read, refusal = tried(
        lambda: read_facts(path, skip_bad=skip_bad, needs_subject=needs_subject, chat=CHAT, check=check)
    )
    if read is None:
        assert name in refusal
        assert all(len(line) < 1000 for line in refusal.splitlines())
        return "refused"
    assert read.facts
    assert len(read.lines) == len(read.facts)
    assert all(fact.subject in fact.prompt and fact.target_new.strip() for fact in read.facts)
    assert parse_facts(read.facts).facts == read.facts
    write_rejected(folder / "rejected.jsonl", read.rejected)
    return "read in part" if read.rejected else "read"


@given(file=files(), skip_bad=st.booleans(), needs_subject=st.booleans())
@USUAL
def test_any_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes], skip_bad: bool, needs_subject: bool
) -> None:
    read_anything(tmp_path_factory.getbasetemp(), *file, skip_bad, needs_subject)


@given(record=records() | VALUES, needs_subject=st.booleans())
@USUAL
def test_any_object_in_memory_is_read_or_refused(record: Any, needs_subject: bool) -> None:
    read, refusal = tried(lambda: parse_facts([record], needs_subject=needs_subject, chat=CHAT))
    if read is None:
        assert refusal.startswith("facts")
    else:
        assert parse_facts(read.facts).facts == read.facts


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_files(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the embedded model's tokenizer and limits; how many of which kind were read is printed."""
    check = fitting(load_tokenizer(str(FACTWORLD)), Limits.of(load_config(str(FACTWORLD))), 16)
    ended = Counter[tuple[str, str]]()

    @given(file=files(), skip_bad=st.booleans(), needs_subject=st.booleans())
    @settings(USUAL, max_examples=PART, derandomize=False)
    def part(file: tuple[str, bytes], skip_bad: bool, needs_subject: bool) -> None:
        ended[file[0], read_anything(tmp_path, *file, skip_bad, needs_subject, check)] += 1

    for start in range(PARTS):  # in parts, since hypothesis remembers all files of a run and gets slow
        seed(start)(part)()
    with capsys.disabled():
        for (name, how), count in sorted(ended.items()):
            print(f"\n{count:>7,} {name} {how}", end="")
    assert sum(ended.values()) >= PARTS * PART
