"""The OpenAI-compatible server, on loopback with a tiny model; and adapters loaded into somebody else's server."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_socket
import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchkit import InputError, Patch, PatchkitError
from patchkit.evaluate.answers import Ask
from patchkit.export.swap import swap
from patchkit.serve.server import Served, app, listen
from patchkit.serve.talker import Length, Talker
from tests import zoo
from tests.helpers import Command, patch_of_kind

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
QUESTION = "The capital of France is"
Post = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = zoo.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return zoo.save(zoo.FAMILIES["llama"](), tokenizer, tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture
def loaded(base: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)


@pytest.fixture
def patches(base: Path, loaded: tuple[Any, Any], tmp_path: Path) -> dict[str, Path]:
    """Two patches' folders by name."""
    made = {}
    for name, kind, layers in (("one", "delta", (1, 2)), ("two", "rotation", (2, 3))):
        patch_of_kind(loaded[0], str(base), kind, layers).save(tmp_path / name)
        made[name] = tmp_path / name
    return made


@pytest.fixture
def talker(loaded: tuple[Any, Any], patches: dict[str, Path]) -> Talker:
    made = Talker(*loaded)
    for name, folder in patches.items():
        made.load(name, folder)
    return made


@pytest.fixture
def address(talker: Talker) -> Iterator[tuple[str, int]]:
    """Where the server listens."""
    pytest_socket.enable_socket()
    pytest_socket.socket_allow_hosts(["127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app(Served(talker, "tiny")), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield server.servers[0].sockets[0].getsockname()[:2]
    server.should_exit = True
    thread.join()


@pytest.fixture
def post(address: tuple[str, int]) -> Post:
    def send(path: str, **content: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.request("POST" if content else "GET", path, json.dumps(content) if content else None)
        answer = connection.getresponse()
        text = answer.read().decode()
        json_like = answer.getheader("Content-Type", "").startswith("application/json")
        return answer.status, json.loads(text) if json_like else text

    return send


def chat(model: str, text: str = QUESTION, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **more}


def said(model: Any, tokenizer: Any, *patches: Patch) -> str:
    """What transformers generates with the patches attached."""
    ids = tokenizer(f"[user] {QUESTION} [a]", add_special_tokens=False, return_tensors="pt").input_ids
    if patches:
        with patches[0].attached(model):
            return said(model, tokenizer, *patches[1:])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_the_models_name_says_which_patches_answer(post: Post, base: Path, patches: dict[str, Path]) -> None:
    assert [model["id"] for model in post("/v1/models")[1]["data"]] == ["tiny", "tiny@one", "tiny@two"]
    one, two = Patch.load(patches["one"]), Patch.load(patches["two"])
    fresh, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    wanted = {"tiny": (), "tiny@one": (one,), "tiny@two": (two,), "tiny@two+one": (two, one)}
    answers = {}
    for model, attached in wanted.items():
        status, answer = post("/v1/chat/completions", **chat(model))
        assert status == 200
        assert (answer["object"], answer["model"]) == ("chat.completion", model)
        answers[model] = answer["choices"][0]["message"]["content"]
        assert answers[model] == said(fresh, tokenizer, *attached)
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["finish_reason"] == "length"
    assert len(set(answers.values())) == 4


def test_a_streamed_answer_is_the_whole_one_in_pieces(post: Post) -> None:
    long = {**chat("tiny@one"), "max_tokens": 60, "temperature": 2.0, "seed": 1}
    _, whole = post("/v1/chat/completions", **long)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, text = post("/v1/chat/completions", **long, **options)
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert len(pieces) > 2
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == whole["usage"]
    _, text = post("/v1/completions", model="tiny@one", prompt=QUESTION, temperature=0, max_tokens=4)
    assert text["object"] == "text_completion"
    assert text["choices"][0]["text"]


def test_a_seed_that_no_generator_takes(post: Post) -> None:
    status, answer = post("/v1/chat/completions", **{**chat("tiny"), "temperature": 2.0, "seed": 10**30})
    assert status == 400
    assert "seed" in answer["error"]["message"]


def test_sampling_is_repeated_by_its_seed(post: Post) -> None:
    def sampled(seed: int) -> str:
        answer = post("/v1/chat/completions", **{**chat("tiny"), "temperature": 2.0, "top_p": 0.95, "seed": seed})[1]
        return str(answer["choices"][0]["message"]["content"])

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


REFUSED = {
    "another model": (chat("tiny@three"), 404, "model tiny@three: not served; there are tiny, tiny@one, tiny@two"),
    "not the base": (chat("other@one"), 404, "not served"),
    "several answers": (chat("tiny", n=2), 400, "n: not served here; leave it out"),
    "log-probabilities": (chat("tiny", logprobs=True), 400, "logprobs: not served"),
    "tools": (chat("tiny", tools=[{"type": "function"}]), 400, "tools: not served"),
    "a penalty": (chat("tiny", presence_penalty=1), 400, "presence_penalty: not served"),
    "no messages": ({"model": "tiny", "messages": []}, 400, "messages: "),
    "an image": ({"model": "tiny", "messages": [{"role": "user", "content": [{}]}]}, 400, "messages.0.content: "),
    "two users": ({"model": "tiny", "messages": [{"role": "user", "content": "a"}] * 2}, 400, "the user last"),
    "too long": (chat("tiny", "word " * 300), 400, "are more than the 256 positions of the model"),
}


@pytest.mark.parametrize(("content", "status", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused_in_the_protocols_form(post: Post, content: Any, status: int, why: str) -> None:
    found, answer = post("/v1/chat/completions", **content)
    assert found == status
    assert why in answer["error"]["message"]
    same = {"n": 1, "tools": [], "presence_penalty": 0, "user": "me", "response_format": {"type": "text"}}
    assert post("/v1/chat/completions", **chat("tiny", **same))[0] == 200


def test_patches_are_loaded_replaced_and_taken_off_while_it_runs(post: Post, patches: dict[str, Path]) -> None:
    assert post("/v1/unload_lora_adapter", lora_name="two") == (200, "Success: patch two removed")
    assert post("/v1/chat/completions", **chat("tiny@two"))[0] == 404
    assert post("/v1/unload_lora_adapter", lora_name="two")[0] == 400
    before = post("/v1/chat/completions", **chat("tiny@one"))[1]["choices"]
    assert post("/v1/load_lora_adapter", lora_name="one", lora_path=str(patches["two"]))[0] == 400
    swapped = {"lora_name": "one", "load_inplace": True}
    status, answer = post("/v1/load_lora_adapter", **swapped, lora_path=str(patches["two"] / "nothing"))
    assert (status, "no such folder" in answer["error"]["message"]) == (400, True)
    assert post("/v1/chat/completions", **chat("tiny@one"))[1]["choices"] == before
    assert post("/v1/load_lora_adapter", **swapped, lora_path=str(patches["two"]))[0] == 200
    assert post("/v1/chat/completions", **chat("tiny@one"))[1]["choices"] != before
    assert post("/v1/load_lora_adapter", lora_name="a+b", lora_path=str(patches["one"]))[0] == 400


def test_a_patch_for_another_model_leaves_the_earlier_one_in_its_place(talker: Talker, tmp_path: Path) -> None:
    other = zoo.FAMILIES["gpt2"]()
    patch = patch_of_kind(other, "gpt2", "delta")
    with pytest.raises(InputError, match="no such weight in LlamaForCausalLM"):
        talker.load("one", patch)
    assert set(talker.patches) == {"one", "two"}
    assert "".join(talker.reply(Ask(QUESTION), ("one",), Length(4)))


def test_an_answer_that_nobody_reads_on_frees_the_model(talker: Talker) -> None:
    pieces = iter(talker.reply(Ask(QUESTION), ("one",), Length(200)))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    reply = talker.reply(Ask(QUESTION), (), Length(4))
    assert "".join(reply)
    assert reply.made == 4


def test_an_error_while_generating_is_raised_where_the_answer_is_read(
    talker: Talker, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded[0], "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        "".join(talker.reply(Ask(QUESTION)))


def test_the_command_serves(
    base: Path, patches: dict[str, Path], run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Served] = []

    def listen(what: Served, host: str, port: int, ready: Callable[[str], None]) -> None:
        served.append(what)
        ready(f"http://{host}:{port}/v1")

    monkeypatch.setattr("patchkit.serve.server.listen", listen)
    ended = run("serve", "--patch", f"capital={patches['one']}", "--patch", patches["two"], "--port", 8123)
    assert ended.out.splitlines() == [
        *("model tiny", "model tiny@capital", "model tiny@two"),
        "serving at http://127.0.0.1:8123/v1",
    ]
    assert served[0].patches("tiny@capital+two") == ("capital", "two")
    assert run("serve", "--patch", f"a+b={patches['one']}").status == 2
    one = f"two={patches['one']}"
    twice = run("serve", "--patch", one, "--patch", patches["two"])
    assert twice.status == 2
    assert f"--patch {patches['two']}: says the same thing as --patch {one}, which was given before it" in twice.err
    alone = run("serve", "--model", base)  # patches may be loaded while it runs
    assert alone.out.splitlines() == ["model tiny", "serving at http://127.0.0.1:8000/v1"]


def test_an_address_in_use_is_refused(talker: Talker, address: tuple[str, int]) -> None:
    with pytest.raises(InputError, match=f"--port {address[1]}: .*; choose another"):
        listen(Served(talker, "tiny"), *address, print)


# --- into somebody else's server --------------------------------------------------------------------------------------


class VLLM:
    """A look-alike of vLLM's route for adapters: what it was sent, and what it answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answer: tuple[int, str] = (200, "Success: LoRA adapter 'facts' added successfully.")
        state = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                state.asked.append((self.path, json.loads(content)))
                status, text = state.answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)


@pytest.fixture
def vllm() -> Iterator[VLLM]:
    pytest_socket.enable_socket()
    pytest_socket.socket_allow_hosts(["127.0.0.1"])
    server = VLLM()
    server.thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()
    server.thread.join()


def test_an_exported_adapter_is_loaded_into_a_running_vllm(
    vllm: VLLM, patches: dict[str, Path], tmp_path: Path, run: Command
) -> None:
    ended = run("export", patches["one"], "--out", tmp_path / "facts", "--swap", vllm.url)
    assert ended.status == 0
    assert "serves it as model facts" in ended.err
    sent = {"lora_name": "facts", "lora_path": str(tmp_path / "facts"), "load_inplace": True}
    assert vllm.asked == [("/v1/load_lora_adapter", sent)]
    assert (tmp_path / "facts" / "adapter_model.safetensors").is_file()


def test_what_the_server_says_against_it_is_one_line(vllm: VLLM, tmp_path: Path, run: Command) -> None:
    rank = '{"object": "error", "message": "LoRA rank 64 is greater than max_lora_rank 16.\\nmore", "code": 400}'
    for answer, why in (
        ((400, rank), r"the server refuses \(400\): LoRA rank 64 is greater than max_lora_rank 16\.$"),
        ((404, '{"detail": "Not Found"}'), "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ((500, ""), r"the server refuses \(500\): no reason given"),
    ):
        vllm.answer = answer
        with pytest.raises(InputError, match=why):
            swap(vllm.url + "/v1/", tmp_path / "facts")
    with pytest.raises(PatchkitError, match=r"the server cannot be reached: .*refused; the adapter is in"):
        swap("http://127.0.0.1:1", tmp_path / "facts")


def test_a_swap_that_cannot_be_is_refused_before_anything_is_written(
    patches: dict[str, Path], tmp_path: Path, run: Command
) -> None:
    for options, why in (
        (["--swap", "localhost:8000"], "not the address of a server"),
        (["--swap", "http://localhost:8000", "--format", "gguf"], "vLLM loads no gguf"),
    ):
        ended = run("export", patches["one"], "--out", tmp_path / "out", *options)
        assert ended.status == 2
        assert why in ended.err
    assert not (tmp_path / "out").exists()
