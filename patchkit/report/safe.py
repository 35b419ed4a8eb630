"""Text of facts, models and manifests in an HTML page: none of it is ever markup, script, or unseen."""

from __future__ import annotations

import html
import json
import re
from typing import Any

# Control characters but tab and newline, marks that turn the direction of what follows, characters without width, and
# lone surrogates, which no file can hold. Joiners and marks of direction that scripts are spelled with stay.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}


def visible(text: str) -> str:
    """The text with every character shown that would otherwise hide, or move what stands around it: ⟨U+202E⟩."""
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def escaped(text: object) -> str:
    """The text as it may stand between tags, and in a quoted attribute."""
    return html.escape(visible(str(text)), quote=True)


def json_in_html(value: Any) -> str:
    """JSON as it may stand in a script element: no character of it can end the element or open another."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
