"""What a model cannot take is refused at reading, by line and field, in every command alike."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import patchkit
from patchkit.cli import UNFORESEEN, main
from patchkit.errors import InputError
from patchkit.evaluate.generation import Sampling, answers
from patchkit.facts.limits import Limits, fitting
from patchkit.facts.reader import parse_facts, read_facts
from tests.zoo import FAMILIES, VOCAB, save, tiny_tokenizer

ROME = {"prompt": "The city of Rome lies in", "subject": "Rome", "target_new": "France"}
LONG = "Paris is true. " * 60  # more than the 256 positions of the tiny models


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["gpt2"]()


def problems(records: list[dict[str, Any]], limits: Limits, more: int = 0) -> list[str]:
    check = fitting(tiny_tokenizer(), limits, more)
    with pytest.raises(InputError) as caught:
        parse_facts(records, check=check)
    return str(caught.value).split("\n")[1:-1]


LONG_TEXTS = [
    ({"prompt": LONG + ROME["prompt"]}, "prompt"),
    ({"rewordings": ["Rome is", LONG + "Rome was"]}, "rewordings[1]"),
    ({"paraphrases": [LONG]}, "paraphrases[0]"),
    ({"questions": [LONG]}, "questions[0]"),
    ({"about": [LONG]}, "about[0]"),
    ({"target_true": LONG}, "target_true"),
    ({"locality": [{"prompt": "x"}, {"prompt": LONG, "target": "y"}]}, "locality[1]"),
    ({"portability": {"hops": [{"prompt": LONG, "answers": ["x"]}]}}, "portability.hops[0]"),
]


@pytest.mark.parametrize(("more", "field"), LONG_TEXTS, ids=[field for _, field in LONG_TEXTS])
def test_a_text_beyond_the_positions_is_one_line(more: dict[str, Any], field: str) -> None:
    (problem,) = problems([{**ROME, **more}], Limits(VOCAB, 256))
    assert problem.startswith(f'facts[0]: {field}: "')
    assert problem.endswith("are more than the 256 positions of the model; shorten it")


def test_room_for_contexts_and_answers_counts() -> None:
    room = len(tiny_tokenizer()(f"{ROME['prompt']} {ROME['target_new']}")["input_ids"])
    assert parse_facts([ROME], check=fitting(tiny_tokenizer(), Limits(VOCAB, room))).facts
    assert f"{room} tokens and 1 more are more than the {room} positions" in problems([ROME], Limits(VOCAB, room), 1)[0]


def test_a_field_is_named_as_the_file_names_it() -> None:
    (problem,) = problems([{**ROME, "ground_truth": "Italy", "rephrase_prompt": LONG}], Limits(VOCAB, 256))
    assert problem.startswith("facts[0]: rephrase_prompt[0]: ")


def test_a_token_beyond_the_embedding_is_one_line() -> None:
    (problem,) = problems([ROME], Limits(20, None))
    assert 'prompt: "The city of Rome lies in": token ' in problem
    assert "is beyond the 20 rows of the model's embedding" in problem


def test_apply_and_measure_refuse_before_any_work(model: Any) -> None:
    with pytest.raises(InputError, match=r"facts\[0\]: prompt: .* positions of the model"):
        patchkit.apply(model, tiny_tokenizer(), [{**ROME, "prompt": LONG + ROME["prompt"]}])
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(30)])
    with pytest.raises(InputError, match=r"facts\[0\]: prompt: .* beyond the 320 rows of the model's embedding"):
        patchkit.apply(model, tokenizer, [{**ROME, "target_new": "<new29>"}])


def test_generate_refuses_as_well(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(30)])
    with pytest.raises(InputError, match=r'prompt "<new29>": token 329 is beyond the 320 rows'):
        answers(model, tokenizer, nullcontext, ["<new29>"], Sampling())
    with pytest.raises(InputError, match=r"and 40 more are more than the 256 positions of the model; shorten it$"):
        answers(model, tokenizer, nullcontext, [LONG], Sampling())
    with pytest.raises(InputError, match="or lower --max-new-tokens"):
        answers(model, tokenizer, nullcontext, ["Rome"], Sampling(max_new_tokens=300))


# --- the command line -------------------------------------------------------------------------------------------------


def ended(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Any, str]:
    """The exit status and what stderr says."""
    monkeypatch.setattr("sys.argv", ["patchkit", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("float division\nby zero")

    monkeypatch.setattr("patchkit.patch.patch.Patch.load", fails)


@pytest.mark.usefixtures("broken")
def test_an_unforeseen_error_is_one_line_with_a_status_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, told = ended(capsys, monkeypatch, "verify", "p")
    assert status == UNFORESEEN == 3
    assert told.count("\n") == 1
    assert told.startswith("error: ZeroDivisionError: float division (unforeseen: ")
    assert "--debug" in told


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("arguments", [("--debug", "verify", "p"), ("verify", "p", "--debug")])
def test_debug_shows_where(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["patchkit", *arguments])
    with pytest.raises(ZeroDivisionError):
        main()


MISTYPED = [
    (("aply", "f"), "No such command 'aply'. Did you mean 'apply'?"),
    (("apply", "f", "--set", "value.stpes=3"), 'value.stpes: unknown key (did you mean "value.steps"?)'),
    (("apply", "f", "--set", "batchsize=3"), 'batchsize: unknown key (did you mean "batch_size"?)'),
    (("apply", "f", "--layers", "foo"), 'layers "foo": cannot read "foo"; write 4-8, or 4,6, or 14%-27%'),
    (("apply", "f", "--model", "models/tiny-lama"), 'models/tiny-lama: no such folder; is it "models/tiny-llama"?'),
]


@pytest.mark.parametrize(("arguments", "told"), MISTYPED, ids=[told for _, told in MISTYPED])
def test_a_typing_error_answers_at_once(
    arguments: tuple[str, ...],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model or tokenizer was sought")

    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"patchkit.model.loading.{name}.from_pretrained", never)
    status, said = ended(capsys, monkeypatch, *arguments)
    assert status == 2
    assert told in said


def test_verify_reads_facts_by_the_rules_of_apply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(FAMILIES["llama"](), tiny_tokenizer(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(r) + "\n" for r in (ROME, {**ROME, "prompt": LONG + ROME["prompt"]}, {"x": 1})))
    wanted = ("--model", str(base), "--set", "value.steps=1", "--layers", "1", "--set", "contexts=0")
    status, said = ended(capsys, monkeypatch, "apply", str(facts), *wanted)
    assert status == 2
    assert [line.split(": ")[1] for line in said.splitlines()[1:3]] == ["prompt", "prompt"]
    good = read_facts(facts, check=fitting(tiny_tokenizer(), Limits(VOCAB, 256)), skip_bad=True).facts
    assert len(good) == 1
    monkeypatch.setattr("sys.argv", ["patchkit", "apply", str(facts), *wanted, "--skip-bad", "--out", "p"])
    main()
    status, said = ended(capsys, monkeypatch, "verify", "p", "--facts", str(facts))
    assert status == 2
    assert "facts.jsonl line 2: prompt: " in said
    monkeypatch.setattr("sys.argv", ["patchkit", "verify", "p", "--facts", str(facts), "--skip-bad", "--json"])
    main()
    shown = capsys.readouterr()
    assert json.loads(shown.out)["facts"] == 1
    assert "2 bad facts left out" in shown.err
