"""Health of weights and states, intervals and judges: as their definitions have them, on small matrices and texts."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_socket
import torch
from torch import Tensor

import patchkit
from patchkit.bench.health import activation, effective_rank, last_states, moved_states, overlap, turned, weight_drift
from patchkit.bench.judge import Judge
from patchkit.errors import InputError, PatchkitError
from patchkit.evaluate.metrics import metrics
from patchkit.evaluate.spread import by_fact, interval, intervals
from patchkit.maths.linalg import Delta
from patchkit.maths.rotations import Rotation
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import load_model
from patchkit.model.weights import read_weight
from tests import zoo
from tests.helpers import edited_fact, random_patch
from tests.test_report import fact_report, report_of

FACTWORLD = str(Path(__file__).parents[1] / "examples" / "factworld")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_effective_rank_counts_directions() -> None:
    """Of r equal singular values it is r; of one that is much larger than the others, nearly 1."""
    q = torch.linalg.qr(random(8, 8)).Q
    assert effective_rank(Delta(q[:, :5], q[:5])) == pytest.approx(5)
    uneven = Delta(q[:, :2] * torch.tensor([1.0, 1e-6], dtype=torch.float64), q[:2])
    assert effective_rank(uneven) == pytest.approx(1, abs=1e-4)
    shares = torch.tensor([0.75, 0.25], dtype=torch.float64)
    by_hand = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(Delta(q[:, :2] * shares, q[:2])) == pytest.approx(by_hand)
    assert effective_rank(Delta(q[:, :2] * 0, q[:2])) == 0


def test_overlap_is_the_mean_cosine_of_pairs() -> None:
    q = torch.linalg.qr(random(8, 8)).Q
    assert overlap(Delta(random(6, 3), q[:3])) == pytest.approx(0, abs=1e-12)
    right = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    assert overlap(Delta(random(6, 3), right)) == pytest.approx((1 + 2 * math.sqrt(0.5)) / 3)


def test_activation_is_what_the_other_facts_changes_add() -> None:
    model = zoo.FAMILIES["llama"]().double()
    site = inspect_model(model).sites[1]
    delta, keys = Delta(random(site.d_out, 3), random(3, site.d_in, seed=1)), random(site.d_in, 3, seed=2)
    expected = []
    for j in range(3):
        others = sum((torch.outer(delta.left[:, i], delta.right[i]) for i in range(3) if i != j), torch.zeros(1))
        expected.append(float((others @ keys[:, j]).norm() / (read_weight(site).double() @ keys[:, j]).norm()))
    assert activation(delta, keys, site) == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_angles_are_those_of_a_rotation_whatever_the_weights_size(shape: tuple[int, int]) -> None:
    size = min(shape)
    planes = torch.linalg.qr(random(size, 4)).Q
    rotation = Rotation("left", planes, torch.tensor([0.4, 0.1], dtype=torch.float64)).dense()
    weight = random(*shape, seed=3)
    changed = rotation @ weight if size == shape[0] else weight @ rotation
    found = turned(weight, 1.7 * changed - weight)
    assert found[0] == pytest.approx(math.degrees(0.4))
    assert sorted({round(each, 3) for each in found}) == [0, round(math.degrees(0.1), 3), round(math.degrees(0.4), 3)]
    assert turned(weight, 0.5 * weight) == pytest.approx([0] * 11, abs=1e-5)


def test_drift_has_the_norms_of_the_edited_weight() -> None:
    model = zoo.FAMILIES["llama"]()
    patch = random_patch(model, "base", [edited_fact()], ranks={1: 3}, size=0.5)
    (name,) = patch.updates
    weight = read_weight(inspect_model(model).sites[1]).double()
    (delta,) = patch.updates[name]
    changed = weight + delta.left.double() @ delta.right.double()
    drift = weight_drift(model, patch, {})[name]
    assert drift.norm == pytest.approx(float(changed.norm() / weight.norm()) - 1)
    spectral = [float(torch.linalg.matrix_norm(each, 2)) for each in (weight, changed)]
    assert drift.spectral == pytest.approx(spectral[1] / spectral[0] - 1)
    assert drift.size == pytest.approx(0.5, rel=1e-5)
    assert drift.overlap is not None
    assert drift.activation is not None
    assert 1 < (drift.effective_rank or 0) <= 3
    assert 0 < (drift.angle or 0) < 90


# --- states -----------------------------------------------------------------------------------------------------------


def test_states_are_those_at_the_last_token_of_each_prompt() -> None:
    loaded = load_model(FACTWORLD, "cpu", "float32")
    prompts = ["Mira lives in", "The capital of the country is", "A"]
    found = last_states(LayerRunner(inspect_model(loaded.model)), loaded.tokenizer, prompts)
    for place, prompt in enumerate(prompts):
        ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = loaded.model(ids, output_hidden_states=True).hidden_states
        assert torch.allclose(found[0, place], states[1][0, -1], atol=1e-5)
    assert found.shape[:2] == (len(states) - 1, 3)


def test_shift_and_plane() -> None:
    before = random(2, 40, 6).float()
    same = moved_states(before, before)
    assert same.shift == (0, 0)
    assert same.before == same.after
    after = before.clone()
    after[1] *= 1.5
    moved = moved_states(before, after)
    assert moved.shift == pytest.approx((0, 0.5))
    plane = torch.tensor(moved.before)
    spread = torch.linalg.svdvals((before[1] - before[1].mean(0)).double())
    assert plane.norm(dim=0).tolist() == pytest.approx(spread[:2].tolist(), rel=1e-5)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_values_behind_an_interval_have_the_metrics_mean() -> None:
    """On a real report, so that no metric is taken of other rows than its interval."""
    loaded = load_model(FACTWORLD, "cpu", "float32")
    facts = patchkit.read_facts(str(Path(FACTWORLD).parent / "facts.jsonl"), limit=3).facts
    patch = patchkit.apply(loaded.model, loaded.tokenizer, facts, overrides=("steps=6", "contexts=1"))
    report = patchkit.measure(loaded.model, loaded.tokenizer, patch)
    values, checked = by_fact(report), 0
    for metric in metrics():
        if (value := metric.of(report)) is not None and metric.key in values:
            assert sum(values[metric.key]) / len(values[metric.key]) == pytest.approx(value), metric.key
            low, high = intervals(report)[metric.key]
            assert low <= value + 1e-9
            assert value <= high + 1e-9
            checked += 1
    assert checked >= 12


def test_an_interval_is_that_of_the_mean() -> None:
    """With many values it is the normal one: the mean ± 1.96 standard errors."""
    values = random(400).tolist()
    low, high = interval(values) or (0, 0)
    mean, error = sum(values) / 400, float(torch.tensor(values).std()) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.25 * error)
    assert interval(values) == (low, high)
    assert interval([1.0] * 5) == (1.0, 1.0)
    assert interval([1.0]) is None


# --- a judge ----------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that says yes where the given answer has "Peru" in it."""

    asked: ClassVar[list[Any]] = []
    says: ClassVar[Any] = None
    status: ClassVar[int] = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, self.headers.get("Authorization"), body))
        answer = body["messages"][-1]["content"].partition("Given answer: ")[2]
        said = self.says or ("Yes." if "Peru" in answer else "no")
        self.send_response(self.status)
        self.end_headers()
        if self.status != 200:
            self.wfile.write(said.encode())
            return
        self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    pytest_socket.enable_socket()
    pytest_socket.socket_allow_hosts(["127.0.0.1"])
    Server.asked, Server.says, Server.status = [], None, 200
    serving = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}/v1"
    serving.shutdown()
    serving.server_close()


def test_a_judge_is_asked_once_for_each_answer(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHKIT_JUDGE_KEY", "my-key")
    judge = Judge(server, tmp_path / "judged.jsonl", "some-model")
    assert judge.right("Where?", "Lima", "It is in the capital of Peru.")
    assert not judge.right("Where?", "Lima", "Oslo")
    assert not judge.right("Where?", "Lima", " ")
    assert len(Server.asked) == 2
    path, key, body = Server.asked[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer my-key", "some-model", 0)
    again = Judge(server, tmp_path / "judged.jsonl", "some-model")
    assert again.right("Where?", "Lima", "It is in the capital of Peru.")
    assert len(Server.asked) == 2
    assert Judge(server, tmp_path / "judged.jsonl", "other").right("Where?", "Lima", "It is in the capital of Peru.")
    assert len(Server.asked) == 3
    assert "my-key" not in (tmp_path / "judged.jsonl").read_text("utf-8")


def test_a_judges_share_is_the_mean_over_facts(server: str, tmp_path: Path) -> None:
    facts = [fact_report(number) for number in range(2)]
    for fact, answers in zip(facts, ("Peru Oslo Oslo Peru Peru", "Peru Peru Peru Oslo Oslo"), strict=True):
        for row, said in zip(fact.more["in_use"]["asked"], answers.split(), strict=True):
            row["after"] = said
    known = [edited_fact(id=fact.id, aliases=("the City of Kings",)) for fact in facts]
    share = Judge(server, tmp_path / "judged.jsonl").share(report_of(facts), known)
    assert share == pytest.approx((1 / 3 + 1) / 2)  # the reworded ones do not count, as in asked
    assert "Rome or the City of Kings" in Server.asked[0][2]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("said", "right"), [("**Yes**", True), ('"yes", it does', True), ("No.", False), ("\nno", False)]
)
def test_marks_around_a_judges_word_do_not_count(server: str, tmp_path: Path, said: str, right: bool) -> None:
    Server.says = said
    assert Judge(server, tmp_path / "judged.jsonl").right("Where?", "Lima", "Oslo") is right


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, '{"error": {"message": "no temperature here"}}', "answered 400 Bad Request: no temperature here"),
        (404, '{"error": "no such model"}', "answered 404 Not Found: no such model"),
        (401, "who\nare you?", "answered 401 Unauthorized: who are you?; its key is in PATCHKIT_JUDGE_KEY"),
    ],
)
def test_what_a_judges_server_says_of_a_refusal_is_told(
    server: str, tmp_path: Path, status: int, body: str, message: str
) -> None:
    Server.says, Server.status = body, status
    with pytest.raises(PatchkitError, match=re.escape(message)):
        Judge(server, tmp_path / "judged.jsonl").right("Where?", "Lima", "Oslo")


def test_a_judge_that_does_not_say_yes_or_no_is_refused(server: str, tmp_path: Path) -> None:
    Server.says = "Nobody knows"
    with pytest.raises(PatchkitError, match='it said "Nobody knows" where yes or no was asked for'):
        Judge(server, tmp_path / "judged.jsonl").right("Where?", "Lima", "Oslo")
    with pytest.raises(InputError, match="not an address"):
        Judge("localhost", tmp_path / "judged.jsonl")
    with pytest.raises(PatchkitError, match="no answer from the server: Connection refused"):
        Judge("http://127.0.0.1:9/v1", tmp_path / "judged.jsonl").right("Where?", "Lima", "Oslo")
