"""Numbers and names in sentences, and other people's text where it must not do anything."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

# Control characters but tab and newline, which a terminal would obey; marks that turn the direction of what follows;
# characters without width; line ends that look like spaces; and lone surrogates, which no file can hold. Joiners stay,
# and marks of direction that scripts are spelled with.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_NO_MARKUP = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}
_IN_MARKDOWN = str.maketrans({**{char: f"\\{char}" for char in "\\`*[]|!~"}, "&": "&amp;", "<": "&lt;"})


def visible(text: str) -> str:
    """The text with every character shown that would otherwise hide, move what stands around it, or be obeyed by a
    terminal: ⟨U+202E⟩. All others stay as they are."""
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def in_html(text: object) -> str:
    """The text as it may stand between tags of HTML, and in a quoted attribute."""
    return html.escape(visible(str(text)), quote=True)


def in_markdown(text: str) -> str:
    """The text on one line of Markdown, shown as it is: no markup, link, image or HTML of it takes effect."""
    shown = "".join(" " if char in "\r\n\t" else char for char in text if char.isprintable() or char in "\r\n\t")
    return shown.translate(_IN_MARKDOWN)


def in_code(text: str) -> str:
    """The text as it may stand in a span of code of Markdown, between backticks."""
    return "".join(char for char in text if char.isprintable() and char not in "`|").strip() or "-"


def in_json(text: str) -> str:
    """A text of JSON with the characters of `visible` as JSON escapes them, so that its value is the same."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}" if ord(found[0]) > 31 else found[0], text)


def json_in_html(value: Any) -> str:
    """JSON as it may stand in a script element: no character of it can end the element or open another."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_NO_MARKUP)


def counted(count: int, noun: str) -> str:
    """ "1 fact", "2 facts", "1,024 tokens"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """ "layer 2", "layers 2, 3"."""
    return f"{noun}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


_IRREGULAR = {"do": "does", "are": "is", "have": "has", "were": "was"}


def agreeing(count: int, verb: str) -> str:
    """The verb as it goes with so many: 1 "holds", 2 "hold"."""
    return _IRREGULAR.get(verb, f"{verb}s") if count == 1 else verb


def one_line(text: str) -> str:
    """The text with a space for whatever whitespace it has."""
    return " ".join(text.split())


def in_short(name: str, subject: str, target: str) -> str:
    """A fact by its id and, for people, by what it says: "facts-002 (Nalo Liskim -> Banco Folpam)"."""
    return f"{one_line(name)} ({beginning(subject, 8)} -> {beginning(target, 8)})"


def listed(names: Sequence[str], most: int = 10) -> str:
    """The names with commas between them, and how many more there are than `most`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(one_line, names[:most])) + more


def beginning(text: str, most: int = 15) -> str:
    """The first words of `text`, on one line; dots say that there are more."""
    words = text.split()
    return " ".join(words[:most]) + (" ..." if len(words) > most else "")


def first_words(text: str, like: str) -> str:
    """The beginning of `text`: as many words as `like` has, and one more that shows how it goes on."""
    return " ".join(text.split()[: len(like.split()) + 1])
