"""YAML from people and strangers: plain values, no more of them than the file is long, and one line of refusal."""

from __future__ import annotations

from typing import Any

import yaml

_TIME = "tag:yaml.org,2002:timestamp"


class PlainLoader(yaml.SafeLoader):
    """References, with which a small file could be endless, are refused; dates stay as they are written."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a reference (*name)")
        return super().compose_node(parent, index)


PlainLoader.yaml_implicit_resolvers = {
    character: [pair for pair in pairs if pair[0] != _TIME]
    for character, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

FAULTS = (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, OverflowError)
"""What reading YAML raises: numbers and dates that are none make other errors than YAMLError."""


def told(error: BaseException) -> str:
    """Why it cannot be read, in a few words on one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    fault = getattr(error, "problem", None) or " ".join(str(error).split()) or type(error).__name__
    return str(fault)[:200]


def read_yaml(text: str) -> Any:
    """The value of a text of YAML.

    Raises:
        ValueError: it cannot be read; the message says why, on one line.
    """
    try:
        return yaml.load(text, PlainLoader)
    except FAULTS as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError((f"line {mark.line + 1}: " if mark else "") + told(error)) from None
