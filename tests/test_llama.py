"""Exported patches in llama.cpp itself: `make test-llama` builds the client and runs these; without it they skip."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchkit.export.formats import export
from patchkit.export.job import Options
from tests.real_patch import TOKENS, Say, compared, real_patch
from tests.test_real_models import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.llama]
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def in_llama_cpp(adapter: Path | None) -> Say:
    llama_cpp = pytest.importorskip("llama_cpp", reason="no llama-cpp-python: make test-llama")
    if not GGUF.is_file():
        pytest.skip(f"no {GGUF}: make test-llama")
    model = llama_cpp.Llama(str(GGUF), lora_path=adapter and str(adapter), n_ctx=512, verbose=False)

    def say(ids: list[int]) -> str:
        text: str = model.create_completion(ids, max_tokens=TOKENS, temperature=0)["choices"][0]["text"]
        return text

    return say


def test_edits_that_hold_in_transformers_hold_in_llama_cpp(tmp_path: Path) -> None:
    """At least 0.9 of them, on the base's own 4-bit file, where the plain file does not say them."""
    plain, patch = in_llama_cpp(None), real_patch(tmp_path / "statistics")
    export(patch, tmp_path / "out", "gguf", options=Options(gguf_base=str(GGUF)))
    held, hold, known, _ = compared(patch, plain, in_llama_cpp(tmp_path / "out" / "adapter.gguf"))
    assert held >= len(patch.manifest.facts)
    assert hold >= 0.9 * held
    assert known <= 0.2 * held
