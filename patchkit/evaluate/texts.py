"""What a report says of single texts: plain text, a paraphrase, a neighbor."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Perplexity(BaseModel):
    """Perplexity of plain text on the base and with the patch."""

    model_config = ConfigDict(frozen=True)
    before: float
    after: float
    ratio: float


class ParaphraseReport(BaseModel):
    """A paraphrase, and how the base and the patched model go on with it, greedily."""

    model_config = ConfigDict(frozen=True)
    prompt: str
    before: str
    after: str
    exact: bool


class NeighborReport(BaseModel):
    """A neighbor, and the likeliest tokens where its target (else the fact's) stands, on both models, as text."""

    model_config = ConfigDict(frozen=True)
    prompt: str
    target: str | None
    before: str
    after: str
    unchanged: bool
