"""Facts whose keys stand for something else as well are told before the edit, and the worst are refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from patchkit import methods
from patchkit.editing import closeness
from patchkit.editing.closeness import Closeness
from patchkit.facts.chat import ChatTemplate
from patchkit.facts.schema import Fact
from patchkit.maths.covariance import Covariance
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.loading import embedded_model, load_model
from patchkit.runs.workspace import Workspace
from tests import zoo
from tests.helpers import Command, write_facts

SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}[You are Pelo Tulkor]{% endif %}{% for m in messages %}"
    "[{{ m['role'] }}: {{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}[answer:{% endif %}"
)
BOUNDS = {
    name: getattr(closeness, name) for name in ("TEMPLATE", "TEMPLATE_REFUSED", "COMMON", "COMMON_REFUSED", "OTHER")
}


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones."""
    for name, bound in BOUNDS.items():
        monkeypatch.setattr(closeness, name, bound)


@cache
def workspace() -> tuple[Workspace, Covariance]:
    """The embedded model, with the statistics of its lowest site."""
    loaded = load_model(str(embedded_model()))
    made = Workspace.of(loaded.model, loaded.tokenizer)
    text = made.corpus(made.texts[0], chat=False)
    return made, made.statistics(methods.get("memit"), made.runner.arch.sites[:1], text)[0][0]


def measured(*facts: Fact, chat: bool = False, covariance: Covariance | None = None) -> list[Closeness]:
    made, usual = workspace()
    covariance = covariance or usual
    made.tokenizer.chat_template = SYSTEM
    template = ChatTemplate(made.tokenizer) if chat else None
    return closeness.closeness(made.runner, made.tokenizer, facts, made.runner.arch.sites[0], covariance, template)


def fact(subject: str, prompt: str = "{} has the profession of") -> Fact:
    return Fact(id=subject, prompt=prompt.format(subject), subject=subject, target_new="lawyer")


@pytest.mark.usefixtures("bounds")
def test_a_subject_of_the_system_prompt_is_refused_and_an_ordinary_one_is_not() -> None:
    named, other = measured(fact("Pelo Tulkor"), fact("Nalo Liskim"), chat=True)
    assert named.refused
    (line,) = named.warnings()
    assert 'fact Pelo Tulkor: the key of "Pelo Tulkor" is close to that of ' in line
    assert "every answer in chat may change with it" in line
    assert not other.refused
    assert list(other.warnings()) == []
    assert not measured(fact("Pelo Tulkor"))[0].refused  # without a template there is nothing to be close to


@pytest.mark.usefixtures("bounds")
def test_a_subject_all_over_the_text_is_told(tmp_path: Path) -> None:
    """By how many times its usual share of an edit plain text would get."""
    made, _ = workspace()
    text = tmp_path / "text.txt"
    text.write_text(made.texts[0].read_text(encoding="utf-8")[:20_000] + "Pelo Tulkor is. " * 400, encoding="utf-8")
    corpus = made.corpus(text, chat=False)
    covariance = made.statistics(methods.get("memit"), made.runner.arch.sites[:1], corpus)[0][0]
    everywhere, once = measured(fact("Pelo Tulkor"), fact("Nalo Liskim"), covariance=covariance)
    (line,) = everywhere.warnings()
    assert "is like those all over plain text (plain text gets 2.9 times its usual share" in line
    assert list(once.warnings()) == []


@pytest.mark.usefixtures("bounds")
def test_one_thing_in_two_wordings_is_close_to_itself_and_one_subject_twice_is_no_news() -> None:
    one, _, far = measured(fact("old Pelo Tulkor"), fact("Pelo Tulkor"), fact("Nalo Liskim"))
    assert one.other == ("Pelo Tulkor", "Pelo Tulkor")
    assert 'is close to that of "Pelo Tulkor" of fact Pelo Tulkor' in next(one.warnings())
    assert list(far.warnings()) == []
    again = Fact(id="again", prompt="Nalo Liskim lives in", subject="Nalo Liskim", target_new="Rome")
    assert all(each.other is None for each in measured(fact("Nalo Liskim"), again))


def test_earlier_facts_count() -> None:
    made, covariance = workspace()
    site, earlier = made.runner.arch.sites[0], {"old": ("Pelo", covariance.matrix[:, 0].double())}
    (found,) = closeness.closeness(made.runner, made.tokenizer, [fact("Nalo")], site, covariance, earlier=earlier)
    assert found.other == ("old", "Pelo")


def test_the_first_token_of_a_prompt_has_not_the_key_of_an_attention_sink() -> None:
    runner = LayerRunner(inspect_model(zoo.FAMILIES["gpt2"]()))
    site, tokenizer = runner.arch.sites[1], zoo.tiny_tokenizer(bos=False)
    facts = [fact("P", "P is"), fact("P", f"{closeness._BEFORE}P is")]
    first, later = closeness.closeness(runner, tokenizer, facts, site, Covariance(torch.eye(site.d_in).double(), 1))
    assert first.common == pytest.approx(later.common)


def test_apply_refuses_by_fact_unless_told(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path / "model")
    write_facts("facts.jsonl", {"id": "rome", "prompt": "Rome lies in", "subject": "Rome", "target_new": "Peru"})
    monkeypatch.setattr(closeness, "COMMON", 0.0)
    monkeypatch.setattr(closeness, "COMMON_REFUSED", 0.0)
    arguments = ("apply", "facts.jsonl", "--model", model, "--layers", "1", "--set", "steps=2", "--quick", "--out", "p")
    ended = run(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert "1 of 1 fact would change what the model says everywhere" in ended.err
    assert 'fact rome: the key of "Rome" is like those all over plain text' in ended.err
    assert "--allow-close-keys" in ended.err
    assert not Path("p").exists()
    ended = run(*arguments, "--allow-close-keys")
    assert ended.status == 0
    assert 'fact rome: the key of "Rome" is like those all over plain text' in ended.err
