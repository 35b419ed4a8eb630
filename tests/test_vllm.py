"""Exported patches in vLLM itself: `make test-vllm` installs its CPU build beside the project's own environment and
runs these; without it they skip."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_socket

from patchkit.patch.manifest import EditedFact
from tests.helpers import Command
from tests.real_patch import TOKENS, Say, compared, real_patch, transformers_model
from tests.test_real_models import ROOT, model_folder

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
PYTHON = Path(os.environ.get("PATCHKIT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` of the CPU build ends in its own version's number
START = 400
"""Seconds until the server answers, at most."""


@dataclass(frozen=True)
class Server:
    """A vLLM server that is running."""

    url: str

    def post(self, path: str, **content: object) -> dict[str, object]:
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, object] = json.loads(answer.read())
            return found

    def said_by(self, name: str) -> Say:
        def say(ids: list[int]) -> str:
            made = self.post("/v1/completions", model=name, prompt=ids, max_tokens=TOKENS, temperature=0)
            return str(made["choices"][0]["text"])  # type: ignore[index]

        return say


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It serves SmolLM2 as "base", in float32."""
    if not PYTHON.is_file():
        pytest.skip(f"no {PYTHON}: make test-vllm")
    pytest_socket.enable_socket()
    pytest_socket.socket_allow_hosts(["127.0.0.1"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = ["--model", str(model_folder("smollm2-135m")), "--served-model-name", "base", "--dtype", "float32"]
    asked += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512", "--enforce-eager"]
    asked += ["--enable-lora", "--max-lora-rank", "16"]
    more = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    more |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as out:
        running = subprocess.Popen(
            [str(PYTHON), "-m", SERVER, *asked], env={**os.environ, **more}, stdout=out, stderr=out
        )
        try:
            yield ready(Server(f"http://127.0.0.1:{port}"), running, log)
        finally:
            running.terminate()
            running.wait(60)


def ready(server: Server, running: subprocess.Popen[bytes], log: Path) -> Server:
    """The server, when it answers."""
    until = time.monotonic() + START
    while time.monotonic() < until and running.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5):
            return server
        time.sleep(1)
    raise AssertionError(f"vLLM does not answer:\n{log.read_text()[-3000:]}")


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
    held, hold, known, alike = compared(patch, server.said_by("base"), server.said_by("facts"))
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
    return fact.target_new in server.said_by("facts")(tokenizer(fact.prompt).input_ids)
