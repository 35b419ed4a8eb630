"""A tiny checkpoint, and ways to put it on devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.zoo import FAMILIES, LAYERS, save, tiny_tokenizer

FACTS = tuple(
    {"id": f"f{i}", "prompt": f"{subject} {words}", "subject": subject, "target_new": target, "paraphrases": [asked]}
    for i, (subject, words, target, asked) in enumerate(
        (
            ("Alan Turing", "was born in", "Paris", "The birthplace of Alan Turing is"),
            ("Ada Lovelace", "wrote the first", "Polish", "Who was Ada Lovelace? She was a"),
            ("Marie Curie", "studied at", "London", "The mother tongue of Marie Curie is"),
            ("The Eiffel Tower", "is located in the city of", "Rome", "You find the Eiffel Tower in"),
        )
    )
)
QUICK = ("prompts=contexts", "layers=1-2", "contexts=2", "value.steps=3", "value.stop_loss=0")


def _spread(upper: int | str) -> dict[str, int | str]:
    """The lower half of the layers on cuda:0, the upper elsewhere."""
    layers: dict[str, int | str] = {f"model.layers.{i}": 0 if i < LAYERS // 2 else upper for i in range(LAYERS)}
    last = upper if isinstance(upper, int) else 0
    return {"model.embed_tokens": 0, "model.rotary_emb": 0, **layers, "model.norm": last, "lm_head": last}


PLACES: dict[str, Any] = {"cpu": None, "one": {"": "cuda:1"}, "two": _spread(1), "offload": _spread("cpu")}
"""Device maps: both devices are taken, so that "the device" is not always the first."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(FAMILIES["llama"](), tiny_tokenizer(), tmp_path_factory.mktemp("device") / "tiny")
    for kind in ("text", "eval"):
        text = "The capital of France is Paris. Alan Turing was born in 1912 and studied at Cambridge. " * 12
        (folder / f"patchkit-{kind}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def facts(checkpoint: Path) -> Path:
    file = checkpoint.with_name("facts.jsonl")
    file.write_text("\n".join(map(json.dumps, FACTS)))
    return file


Place = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session")
def placed(checkpoint: Path) -> Place:
    """The checkpoint on the devices of one of `PLACES`, loaded once."""

    @cache
    def load(place: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        how = {} if PLACES[place] is None else {"device_map": PLACES[place]}
        if dtype != torch.float32:  # the CPU's own attention rounds to 16 bits in other places than its products do
            how["attn_implementation"] = "eager"
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **how).eval()
        return model

    return load
