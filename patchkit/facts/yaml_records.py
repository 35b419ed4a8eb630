"""Fact files in YAML, taken apart into records with lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from patchkit.errors import InputError
from patchkit.facts.containers import LISTS, Entry, decoded
from patchkit.io.yaml_text import FAULTS, PlainLoader, told

_NULL = "tag:yaml.org,2002:null"


class _Loader(PlainLoader):
    """Numbers stay as they are written, too."""


_Loader.yaml_implicit_resolvers = {
    character: [pair for pair in pairs if pair[0] == _NULL]
    for character, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def yaml_entries(data: bytes, name: str) -> Iterator[Entry]:
    """A list of objects, an object that holds one, or several documents; every value but null is text.

    Raises:
        InputError: it is not YAML, or it refers from one place to another.
    """
    text, found = decoded(data, name), list[tuple[int, Any]]()
    try:
        loader = _Loader(text)
        while loader.check_node():
            records = _records(loader.get_node())
            found += [(each.start_mark.line + 1, loader.construct_object(each, deep=True)) for each in records]
    except FAULTS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name} line {mark.line + 1}" if mark else name
        raise InputError(f"{where}: not YAML that can be read ({told(error)}); mend it, or write JSON") from None
    for number, (line, value) in enumerate(found, 1):
        raw = json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
        yield Entry(f"line {line} (record {number})", line, raw, value)


def _records(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if isinstance(node, yaml.MappingNode):
        held = [value for key, value in node.value if getattr(key, "value", None) in LISTS]
        if held and isinstance(held[0], yaml.SequenceNode):
            return list(held[0].value)
    return [node] if node else []
