"""A real model in four bits, from `apply` to `merge` as its user goes: `make test-bitsandbytes` and `make test-gptq`
install what quantizes it; without that this skips."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf

from patchkit.patch.manifest import EditedFact
from patchkit.patch.patch import Patch
from tests.helpers import Command
from tests.quantizers import with_bitsandbytes, with_gptqmodel
from tests.real_patch import TOKENS, Said, answers, question, transformers_model
from tests.servers import Server, loopback_alone, serving
from tests.test_real_models import ROOT, model_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
FACTS = ROOT / "examples" / "real_facts.jsonl"


QUANTIZERS: dict[str, Callable[[Path, Path], Path]] = {
    "bitsandbytes": partial(with_bitsandbytes, bits=4),
    "gptq": partial(with_gptqmodel, method="gptq", passages=32),
    "awq": partial(with_gptqmodel, method="awq", passages=32),
}


@pytest.mark.parametrize("method", QUANTIZERS)
def test_a_model_of_four_bits_is_edited_served_reverted_and_merged(method: str, run: Command, tmp_path: Path) -> None:
    """The facts, asked as prompts and in chat: nine of ten answers have them where the packed model is served, half of
    those in the full-precision checkpoint, whose own keys nobody looked at, and a fifth at most without it. A fact
    taken back is gone in the running server, and all but one of the other answers stay."""
    full = model_folder("smollm2-135m")
    base, patch = edited(run, method, full, tmp_path)
    report = run("verify", patch, "--model", base, "--json").json()
    assert report["efficacy"]["exact"] >= 0.9
    assert report["more"]["in_use"]["asked"] >= 0.8

    facts = Patch.load(patch).manifest.facts
    merged = tmp_path / "merged"
    ok(run, "merge", patch, "--model", full, "--out", merged)
    said = {"full precision": answers(*transformers_model(), facts), "merged into it": answers(*read(merged), facts)}
    out, *others = facts
    with served(base, patch, tmp_path / "log") as server:
        said["packed"] = served_answers(server, "base", facts)
        said["packed, patched"] = served_answers(server, "base@patch", facts)
        ok(run, "revert", patch, "--model", base, "--fact", out.id, "--force")
        server.post("/v1/load_lora_adapter", lora_name="patch", lora_path=str(patch), load_inplace=True)
        said["packed, one reverted"] = served_answers(server, "base@patch", facts)

    print(json.dumps({key: value for key, value in report.items() if key != "per_fact"}))
    hold = {name: told(name, texts, facts) for name, texts in said.items()}
    assert hold["packed"] <= 0.2 * len(facts) * 2
    assert hold["full precision"] <= 0.2 * len(facts) * 2
    assert hold["packed, patched"] >= 0.9 * 2 * len(facts)
    assert hold["merged into it"] >= 0.5 * hold["packed, patched"]
    gone = said["packed, one reverted"]
    assert not any(out.target_new in gone[out.id, form] for form in ("prompt", "chat"))
    assert told("the others", gone, others) >= told("the others", said["packed, patched"], others) - 1


def edited(run: Command, method: str, full: Path, folder: Path) -> tuple[Path, Path]:
    """The quantized checkpoint and a patch for it; takes minutes, unless PATCHKIT_QUANTIZED has a folder `method` with
    `base` and `patch` of an earlier run."""
    kept = os.environ.get("PATCHKIT_QUANTIZED")
    work = Path(kept) / method if kept else folder
    base, patch = work / "base", work / "patch"
    if not base.is_dir():
        QUANTIZERS[method](full, base)
    if not patch.is_dir():
        ok(run, "apply", FACTS, "--model", base, "--out", patch, "--quick")
    return base, Path(shutil.copytree(patch, folder / "of" / "patch"))


def ok(run: Command, *arguments: object) -> None:
    ended = run(*arguments)
    assert ended.status == 0, ended.err


def read(folder: Path) -> tuple[hf.PreTrainedModel, hf.PreTrainedTokenizerBase]:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), hf.AutoTokenizer.from_pretrained(folder)


def served(base: Path, patch: Path, log: Path) -> AbstractContextManager[Server]:
    loopback_alone()
    command = [sys.executable, "-m", "patchkit", "serve", "--model", base, "--patch", patch]
    return serving(command, "/v1/models", log, {}, 200)


def served_answers(server: Server, model: str, facts: Sequence[EditedFact]) -> Said:
    """What the server says of a model where it is asked for facts."""
    how = {"model": model, "max_tokens": TOKENS, "temperature": 0}
    found = {}
    for fact in facts:
        text = server.post("/v1/completions", prompt=fact.prompt, **how)["choices"][0]["text"]
        message = {"role": "user", "content": question(fact)}
        reply = server.post("/v1/chat/completions", messages=[message], **how)["choices"][0]["message"]["content"]
        found |= {(fact.id, "prompt"): text, (fact.id, "chat"): reply}
    return found


def told(name: str, said: Said, facts: Sequence[EditedFact]) -> int:
    """How many answers have their fact's target; prints them all."""
    held = [(fact.id, form) for fact in facts for form in ("prompt", "chat") if fact.target_new in said[fact.id, form]]
    for fact in facts:
        for form in ("prompt", "chat"):
            print(name, fact.id, form, repr(said[fact.id, form]), "" if (fact.id, form) in held else "NOT")
    print(f"{name}: {len(held)} of {2 * len(facts)} hold")
    return len(held)
