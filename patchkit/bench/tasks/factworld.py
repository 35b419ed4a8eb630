"""The questions of factworld.yaml; lm-eval calls this file by its place, so it needs nothing of patchkit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def read(**_: Any) -> dict[str, Dataset]:
    """All questions, in memory: no folder of lm-eval's or of datasets' is written to. Takes the task's metadata."""
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
