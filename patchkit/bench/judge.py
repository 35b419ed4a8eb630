"""Answers judged by another model, over any server that speaks OpenAI's API; every verdict is kept, and asked for once.

A judge counts "the capital of Peru" as Lima, which no comparison of words does; what it says depends on the judge.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from patchkit.errors import InputError, PatchkitError
from patchkit.evaluate.interview import FORMS
from patchkit.evaluate.report import Report
from patchkit.facts.schema import Fact
from patchkit.words import visible

KEY_VARIABLE = "PATCHKIT_JUDGE_KEY"
SECONDS = 120
_REASON = 200
"""Characters of what a server says of a request that it refuses."""
_SYSTEM = "You grade answers. Reply with one word, yes or no."
_QUESTION = """Question: {question}
Correct answer: {target}
Given answer: {answer}

Does the given answer state the correct answer, and nothing that contradicts it? Reply yes or no."""


@dataclass
class Judge:
    """A judge at `url` (as in http://localhost:8000/v1), and the file that keeps what it has said."""

    url: str
    file: Path
    model: str = "default"
    _known: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InputError for an address that is none, or a file that holds something else."""
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"--judge {self.url}: not an address; give one such as http://localhost:8000/v1")
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        try:
            self._known = {each["key"]: bool(each["right"]) for each in map(json.loads, lines)}
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{self.file}: not what a judge has said; move it away") from None

    def share(self, report: Report, facts: Sequence[Fact]) -> float | None:
        """The share of a fact's answers, asked in the forms of `asked`, that are right: mean over facts.

        Raises:
            PatchkitError: the server cannot be reached, or answers otherwise than asked for.
        """
        targets = {fact.id: " or ".join((fact.target_new, *fact.aliases)) for fact in facts}
        shares = []
        for fact in report.per_fact:
            rows = [each for each in fact.more.get("in_use", {}).get("asked", ()) if each["form"] in FORMS]
            if rows:
                shares.append(fmean(self.right(each["question"], targets[fact.id], each["after"]) for each in rows))
        return fmean(shares) if shares else None

    def right(self, question: str, target: str, answer: str) -> bool:
        """Whether an answer is right; an empty one is not."""
        if not answer.strip():
            return False
        asked = _QUESTION.format(question=question, target=target, answer=answer)
        key = hashlib.sha256(f"{self.model}\0{asked}".encode()).hexdigest()
        if key not in self._known:
            said = self._ask(asked)
            self._known[key] = bool(_verdict(said))
            noted = {"key": key, "judge": self.model, "right": self._known[key], "said": said, "asked": asked}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(noted, ensure_ascii=False) + "\n")
        return self._known[key]

    def _ask(self, question: str) -> str:
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 4}
        answer = self._post(body)
        try:
            said = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise PatchkitError(
                f"--judge {self.url}: an answer without choices; is it an OpenAI-compatible server?"
            ) from None
        if not isinstance(said, str) or _verdict(said) is None:
            raise PatchkitError(
                f'--judge {self.url}: it said "{visible(str(said or "")[:80])}" where yes or no was asked for; a model '
                "that thinks before it answers needs that switched off"
            )
        return said

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except HTTPError as error:
            key_hint = f"; its key is in {KEY_VARIABLE}" if error.code in (401, 403) else ""
            said = f"{error.code} {error.reason}{_reason(error)}{key_hint}"
            raise PatchkitError(f"--judge {self.url}: the server answered {said}") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)  # what urllib wraps
            why = getattr(reason, "strerror", None) or reason
            raise PatchkitError(f"--judge {self.url}: no answer from the server: {why}") from None


def _verdict(said: str) -> bool | None:
    """Whether it begins with yes; None where it begins with neither that nor no. Marks around the word do not count."""
    found = re.match(r"\W*(yes|no)\b", said, re.IGNORECASE)
    return found and found[1].lower() == "yes"


def _reason(error: HTTPError) -> str:
    """What a server says of a request that it refuses, in OpenAI's form or as text."""
    try:
        text = error.read(1 << 16).decode("utf-8", "replace").strip()
    except (OSError, HTTPException):
        return ""
    try:
        found = json.loads(text)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, TypeError, KeyError):
        pass
    line = " ".join(text.split())[:_REASON]
    return f": {visible(line)}" if line else ""
