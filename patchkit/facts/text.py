"""How a prompt and what should follow it become one text: the one place that decides whether a space comes between."""

from __future__ import annotations

import re
import unicodedata

# Scripts that are written without spaces between words, with their punctuation.
UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u2e80-\u312f\u3190-\u9fff"  # Chinese characters, kana, Bopomofo, Chinese and Japanese punctuation
    "\ua000-\ua4cf"  # Yi
    "\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f\uffe0-\uffef"  # compatibility, full-width and half-width forms
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"  # more kana, more Chinese characters
    "]"
)


def continuation(prompt: str, target: str, separator: str | None = None) -> str:
    """What follows `prompt`, character for character: the target, with a space before it where the text needs one.

    No space comes after a prompt that ends in whitespace or in a script without spaces, such as Chinese or Thai, nor
    before a target that brings its own. Punctuation and digits at the prompt's end are of either kind: there the
    target's first character decides, if the letters before them are of a script without spaces.

    Args:
        separator: what comes between, where that is known better.
    """
    if separator is None:
        separator = "" if _joined(prompt, target) else " "
    return separator + target


def _joined(prompt: str, target: str) -> bool:
    if not prompt or prompt[-1].isspace() or target[:1].isspace() or is_unspaced(prompt[-1]):
        return True
    last_letter = next((character for character in reversed(prompt) if _is_letter(character)), "")
    return not _is_letter(prompt[-1]) and is_unspaced(last_letter) and is_unspaced(target[:1])


def is_unspaced(character: str) -> bool:
    """Whether a character is of a script that is written without spaces between words."""
    return bool(UNSPACED.match(character))


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"  # letters and the marks written on them


def same_wording(prompt: str) -> str:
    """Equal for two prompts that differ in whitespace alone, and so ask the same thing."""
    return " ".join(prompt.split())
