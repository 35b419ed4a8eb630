"""`patchkit autotune` takes the right pass of those it timed, and later runs take what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patchkit.errors import InputError
from patchkit.model import tuning
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.tuning import ROOM, Tuned
from patchkit.runs import tune
from patchkit.runs.tune import Trial, chosen, is_over, tried
from tests.helpers import Command, command_line
from tests.zoo import FAMILIES, tiny_tokenizer


def trials(a_pass: float, a_token: float, *tokens: int) -> list[Trial]:
    return [Trial(count, a_pass + count * a_token) for count in tokens]


def test_the_smallest_pass_is_taken_that_is_about_as_fast_as_any() -> None:
    """A pass of 10 ms and a tenth of one for each token: with 1,024 tokens nine tenths of the time are theirs."""
    found = trials(0.01, 1e-4, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    assert chosen(found) == Tuned(1024, 100)
    assert chosen(trials(1.0, 1e-4, 32, 64, 128)) == Tuned(128, 128)  # no more than was seen
    assert chosen(trials(0.0, 1e-4, 32, 64, 128)) == Tuned(64, 0)


def test_no_larger_pass_is_timed_once_they_are_no_faster() -> None:
    assert not is_over([])
    assert not is_over(trials(0.01, 1e-4, 32, 64, 128, 256))
    assert is_over(trials(0.001, 1e-4, 512, 1024, 2048, 4096))
    assert is_over(trials(tune.LONGEST, 1e-4, 32))


@pytest.fixture
def runner() -> LayerRunner:
    return LayerRunner(inspect_model(FAMILIES["llama"]()))


def test_memory_ends_it(runner: LayerRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(_: LayerRunner, start: int, rows: int, width: int, points: int) -> float:
        if rows * width > most:
            raise MemoryError
        return 0.01 + 1e-4 * rows * width

    monkeypatch.setattr(tune, "step_seconds", seconds)
    most = 200
    assert [trial.tokens for trial in tried(runner, 1)] == [32, 64, 128]
    most = 40
    with pytest.raises(InputError, match="not enough memory to time passes"):
        tried(runner, 1)


def test_what_was_found_is_for_models_of_one_shape_on_one_device(
    runner: LayerRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path))
    tuning.remember(runner.device, runner.arch.shape, Tuned(1024, 100))
    room = runner.room
    assert (room.tokens, room.a_pass) == (1024, 100)
    assert (room.facts, room.logits) == (ROOM["cpu"].facts, ROOM["cpu"].logits)
    assert LayerRunner(inspect_model(FAMILIES["gpt2"]())).room == ROOM["cpu"]
    monkeypatch.setattr(tuning, "_processor", lambda: "another processor")
    assert LayerRunner(runner.arch).room == ROOM["cpu"]


@pytest.mark.parametrize(
    "held", ["", "[]", "{", '{"a": 1}', '{"a": {"tokens": "many"}}', '{"a": {"tokens": 1e999, "a_pass": 1}}']
)
def test_a_file_that_cannot_be_read_is_none(
    held: str, runner: LayerRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path))
    (tmp_path / "autotune.json").write_text(held, encoding="utf-8")
    assert runner.room == ROOM["cpu"]


@pytest.fixture
def patchkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_line(monkeypatch, capsys)


def test_the_command(patchkit: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "MOST", 3)
    model = FAMILIES["llama"]()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    found = patchkit("autotune", "--model", str(tmp_path / "model"), "--json").json()
    assert [trial["tokens"] for trial in found["trials"]] == [32, 64, 128]
    assert all(trial["seconds"] > 0 for trial in found["trials"])
    runner = LayerRunner(inspect_model(model))
    assert (runner.room.tokens, runner.room.a_pass) == (found["tokens"], found["a_pass"])
    (kept,) = json.loads(Path(found["file"]).read_text(encoding="utf-8"))
    assert kept == f"{found['device']}: {found['models']}"
    assert found["device"] in patchkit("autotune", "--model", str(tmp_path / "model"), "--forget").out
    assert LayerRunner(runner.arch).room == ROOM["cpu"]
    again = patchkit("autotune", "--model", str(tmp_path / "model"), "--forget", "--json")
    assert again.json() == {"forgotten": found["device"]}


@pytest.mark.parametrize("instead", ["cache", "cache/autotune.json"])
def test_a_cache_that_cannot_be_written_is_told_before_anything_is_timed(
    instead: str, runner: LayerRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "step_seconds", lambda *_: pytest.fail("timed"))
    if instead == "cache":
        (tmp_path / "cache").write_text("a file")
    else:
        (tmp_path / instead).mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot be written to; choose another|is a folder.*move it away"):
        tune.tune(runner, 1)
