"""Checkpoints in a few bits, made by the packages that people make them with; a test skips where its package is not
installed: `make test-bitsandbytes`, `make test-gptq`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers as hf

from patchkit.statistics.corpus import PACKAGE_TEXT

GROUP = 32
"""Weights that share a scale."""
_PASSAGE = 900
"""Characters."""


def with_bitsandbytes(full: Path, out: Path, bits: int) -> Path:
    """A checkpoint in 8 bits, or in NF4."""
    pytest.importorskip("bitsandbytes", reason="no bitsandbytes: make test-bitsandbytes")
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    config = hf.BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=torch.float32)
    model = hf.AutoModelForCausalLM.from_pretrained(full, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(out)
    hf.AutoTokenizer.from_pretrained(full).save_pretrained(out)
    return out


def with_gptqmodel(full: Path, out: Path, method: str, passages: int) -> Path:
    """A checkpoint in 4 bits.

    method: "gptq" or "awq", both of which gptqmodel calibrates, and has the layers of that transformers loads.
    passages: of text to calibrate with.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one, which it takes for two cores, it does not start
    gptqmodel = pytest.importorskip("gptqmodel", reason="no gptqmodel: make test-gptq")
    from gptqmodel.quantization import FORMAT, METHOD

    kind = {"quant_method": METHOD.AWQ, "format": FORMAT.GEMM} if method == "awq" else {}
    config = gptqmodel.QuantizeConfig(bits=4, group_size=GROUP, device="cpu", **kind)
    text = PACKAGE_TEXT.read_text(encoding="utf-8")
    some = [text[first : first + _PASSAGE] for first in range(0, passages * _PASSAGE, _PASSAGE)]
    model = gptqmodel.GPTQModel.load(str(full), config)
    model.quantize(some, batch_size=1, **({"backend": gptqmodel.BACKEND.AWQ_TORCH} if method == "awq" else {}))
    model.save(str(out))
    return out
