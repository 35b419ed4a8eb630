"""Formats of fact records: one small class each, found by scanning this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from patchkit.errors import InputError
from patchkit.facts.layout import LAYOUTS, Layout, Options
from patchkit.facts.record import Record, quote


@cache
def _scan() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def layouts(options: Options) -> tuple[Layout, ...]:
    """Every known format.

    Raises:
        InputError: zsre_target is neither "alt" nor "answers".
    """
    if options.zsre_target not in ("alt", "answers"):
        raise InputError(f'zsre_target: expected "alt" or "answers", found {quote(str(options.zsre_target))}')
    _scan()
    return tuple(kind(options) for kind in LAYOUTS.values())


def recognize(record: Record, known: tuple[Layout, ...]) -> Layout:
    """The format that most of the record's fields speak for; native where nothing does."""
    native = next(one for one in known if one.name == "native")
    return max((native, *known), key=lambda one: one.fit(record))
