"""Exported patches in vLLM itself: `make test-vllm` installs its CPU build beside the project's own environment and
runs these; without it they skip."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchkit.patch.manifest import EditedFact
from tests.helpers import Command
from tests.real_patch import TOKENS, Say, compared, real_patch, transformers_model
from tests.servers import Server, loopback_alone, serving
from tests.test_real_models import ROOT, model_folder

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
PYTHON = Path(os.environ.get("PATCHKIT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` of the CPU build ends in its own version's number
START = 400
"""Seconds until the server answers, at most."""


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It serves SmolLM2 as "base", in float32."""
    if not PYTHON.is_file():
        pytest.skip(f"no {PYTHON}: make test-vllm")
    loopback_alone()
    command: list[object] = [PYTHON, "-m", SERVER, "--model", model_folder("smollm2-135m")]
    command += ["--served-model-name", "base", "--dtype", "float32", "--max-model-len", 512, "--enforce-eager"]
    command += ["--enable-lora", "--max-lora-rank", 16]
    more = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    more |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with serving(command, "/health", tmp_path_factory.mktemp("vllm") / "log", more, START) as started:
        yield started


def said_by(server: Server, name: str) -> Say:
    """What the server goes on with, of the model or the adapter of this name."""

    def say(ids: list[int]) -> str:
        made = server.post("/v1/completions", model=name, prompt=ids, max_tokens=TOKENS, temperature=0)
        return str(made["choices"][0]["text"])  # type: ignore[index]

    return say


@pytest.mark.timeout(1800)
def test_edits_that_hold_in_transformers_hold_in_vllm(server: Server, run: Command, tmp_path: Path) -> None:
    """All but one, with the adapter that `export --swap` has loaded into the running server; and what takes its place
    there without a fact no longer says that."""
    patch = real_patch(tmp_path / "statistics")
    patch.save(tmp_path / "patch")
    of_base = (tmp_path / "patch", "--model", model_folder("smollm2-135m"))
    export = ("export", *of_base, "--out", tmp_path / "facts", "--swap", server.url)
    ended = run(*export)
    assert ended.status == 0, ended.err
    held, hold, known, alike = compared(patch, said_by(server, "base"), said_by(server, "facts"))
    assert held >= len(patch.manifest.facts)
    assert hold >= held - 1
    assert alike >= 0.8 * held
    assert known <= 0.2 * held

    out, *others = (fact for fact in patch.manifest.facts if holds(server, fact))
    ended = run("revert", *of_base, "--fact", out.id, "--force")
    assert ended.status == 0, ended.err
    ended = run(*export)
    assert ended.status == 0, ended.err
    assert not holds(server, out)
    assert all(holds(server, fact) for fact in others)


def holds(server: Server, fact: EditedFact) -> bool:
    """Whether the served adapter completes the fact's prompt with its target."""
    _, tokenizer = transformers_model()
    return fact.target_new in said_by(server, "facts")(tokenizer(fact.prompt).input_ids)
