"""Numbers and names in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str) -> str:
    """ "1 fact", "2 facts", "1,024 tokens"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int = 10) -> str:
    """The names with commas between them, and how many more there are than `most`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def beginning(text: str, most: int = 15) -> str:
    """The first words of `text`, on one line; dots say that there are more."""
    words = text.split()
    return " ".join(words[:most]) + (" ..." if len(words) > most else "")


def first_words(text: str, like: str) -> str:
    """The beginning of `text`: as many words as `like` has, and one more that shows how it goes on."""
    return " ".join(text.split()[: len(like.split()) + 1])
