"""Patchkit computes what the published procedure computes: shared steps, batches and small solves change nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchkit.editing.editor import edit, requests_of
from patchkit.editing.recipe import EditConfig
from patchkit.editing.session import plan
from patchkit.editing.values import optimize
from patchkit.facts.requests import build_request
from patchkit.facts.schema import Fact
from patchkit.maths.covariance import Covariance
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from tests.benchmarks import end_to_end
from tests.benchmarks.oracle import added, optimize_value, oracle_edit
from tests.zoo import FAMILIES, save, tiny_tokenizer

CONTEXTS = ["", "The engineer said. ", "Paris is the city of Rome. "]
FACTS = [
    Fact(id=subject, prompt=prompt, subject=subject, target_new=target)
    for prompt, subject, target in [
        ("The capital of France is", "France", "Rome"),
        ("Ada Lovelace was born in", "Ada Lovelace", "Florence and London"),
        ("The mother tongue of Marie Curie is", "Marie Curie", "Italian"),
        ("Leonardo da Vinci painted", "Leonardo da Vinci", "the Eiffel Tower"),
        ("Who wrote the first program? The engineer Alan Turing said that it is", "Alan Turing", "Cambridge"),
    ]
]
# What a random model can do in 15 steps: some of the five facts fall below this loss, some never do.
STOP = {"llama": 6.4, "gpt2": 5.5}


def runner_of(family: str, dtype: torch.dtype = torch.float64) -> LayerRunner:
    return LayerRunner(inspect_model(FAMILIES[family]().to(dtype)))


def config_of(method: str, **changes: object) -> EditConfig:
    data = {
        "method": method,
        "layers": "1-2",
        "batch_size": 2,
        "contexts": 2,
        "context_length": 6,
        "value": {"steps": 6},
    }
    return EditConfig.model_validate({**data, **changes})


def covariances_of(runner: LayerRunner) -> dict[int, Covariance]:
    """Keys with a spectrum that falls off, as those of a trained model do."""
    found = {}
    for site in runner.arch.sites:
        generator = torch.Generator().manual_seed(site.layer)
        keys = torch.randn(300, site.d_in, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(site.d_in, site.d_in, generator=generator, dtype=torch.float64)).Q
        keys = keys * torch.linspace(0.05, 1, site.d_in, dtype=torch.float64) @ basis
        found[site.layer] = Covariance(keys.T @ keys / len(keys), len(keys))
    return found


def apart(ours: Tensor, oracle: Tensor) -> float:
    """Largest relative difference of a column."""
    return float(((ours.double() - oracle.double()).norm(dim=0) / oracle.double().norm(dim=0)).max())


Found = tuple[Tensor, list[int]]  # targets (d, n), steps per fact


def both_values(runner: LayerRunner, config: EditConfig, facts: Sequence[Fact]) -> tuple[Found, Found]:
    """Ours and the oracle's."""
    how = plan(runner.arch, config)
    requests = [build_request(fact, tiny_tokenizer(), CONTEXTS) for fact in facts]
    ours = optimize(runner, requests, how.sites[-1], how.value_at, config.value)
    alone = [optimize_value(runner.arch, request, how, config.value) for request in requests]
    oracle = torch.stack([target for target, _ in alone], 1), [steps for _, steps in alone]
    return (ours.targets, ours.steps.tolist()), oracle


@pytest.mark.parametrize("family", STOP)
def test_values_of_a_batch_equal_those_of_facts_alone(family: str) -> None:
    config = config_of("alphaedit", value={"steps": 15, "stop_loss": STOP[family]})
    (ours, steps), (oracle, oracle_steps) = both_values(runner_of(family), config, FACTS)
    assert min(steps) < 15 == max(steps), "some facts are to stop early and some are not"
    assert steps == oracle_steps
    assert apart(ours, oracle) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_values_agree_in_float32(family: str) -> None:
    (ours, _), (oracle, _) = both_values(runner_of(family, torch.float32), config_of("alphaedit"), FACTS)
    assert apart(ours, oracle) < 1e-4


def test_the_clamp_binds_on_both_sides_alike() -> None:
    config = config_of("alphaedit", value={"steps": 6, "clamp": 0.5})
    (ours, _), (oracle, _) = both_values(runner_of("llama"), config, FACTS)
    (free, _), _ = both_values(runner_of("llama"), config_of("alphaedit"), FACTS)
    assert apart(ours, oracle) < 1e-6
    assert apart(ours, free) > 1e-2


def test_a_subject_at_the_very_start_without_bos() -> None:
    """Its last token may be the first of the text: an empty prefix beside longer ones."""
    runner, config = runner_of("gpt2"), config_of("alphaedit")
    how, tokenizer = plan(runner.arch, config), tiny_tokenizer(bos=False)
    facts = [Fact(id="a", prompt="A is", subject="A", target_new="Rome"), FACTS[1]]
    requests = [build_request(fact, tokenizer, CONTEXTS) for fact in facts]
    assert requests[0].rows[0].subject == 0
    ours = optimize(runner, requests, how.sites[-1], how.value_at, config.value).targets
    oracle = [optimize_value(runner.arch, request, how, config.value)[0] for request in requests]
    assert apart(ours, torch.stack(oracle, 1)) < 1e-6


# Beside the plain layout: values at the module's output (gemma3), a sliding window shorter than the texts (gemma3,
# mistral), Conv1D (gpt2), feed-forward beside attention (gpt_neox, falcon_old), ALiBi (falcon_sequential), blocks that
# flatten the batch (opt).
CASES = [("llama", "alphaedit"), ("llama", "memit"), ("llama", "rome")] + [
    (family, "alphaedit")
    for family in ("gemma3", "gpt2", "gpt_neox", "falcon_old", "falcon_sequential", "mistral", "opt", "granite")
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_whole_edit_equals_the_oracles(family: str, method: str) -> None:
    """Five facts, in batches of two, two and one; ROME one by one."""
    runner, tokenizer, config = runner_of(family), tiny_tokenizer(), config_of(method)
    before = {name: weight.clone() for name, weight in runner.arch.model.state_dict().items()}
    covariances = covariances_of(runner)
    ours = edit(runner, tokenizer, FACTS, config, covariances)
    requests = requests_of(runner, tokenizer, FACTS, ours.contexts, config)
    oracle = oracle_edit(runner.arch.model, requests, config, covariances)
    assert ours.batches == ([1, 1, 1, 1, 1] if method == "rome" else [2, 2, 1])
    assert list(ours.state.deltas(runner.arch)) == list(oracle.deltas) == plan(runner.arch, config).layers
    for layer, delta in oracle.deltas.items():
        assert delta.norm() > 0
        assert (ours.state.deltas(runner.arch)[layer].dense() - delta).norm() <= 2e-6 * delta.norm()
    after = runner.arch.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_what_the_edited_models_say_is_the_same_too() -> None:
    """Deltas through hooks and deltas in the weights are the same model."""
    runner, tokenizer, config = runner_of("llama"), tiny_tokenizer(), config_of("memit")
    covariances = covariances_of(runner)
    ours = edit(runner, tokenizer, FACTS, config, covariances)
    requests = requests_of(runner, tokenizer, FACTS, ours.contexts, config)
    oracle = oracle_edit(runner.arch.model, requests, config, covariances)
    ids = torch.tensor([tokenizer(FACTS[3].prompt)["input_ids"]])
    with torch.no_grad():
        plain = runner.arch.model(ids).logits
        with live_deltas(runner.arch, ours.state.deltas(runner.arch)):
            hooked = runner.arch.model(ids).logits
        with added(runner.arch, oracle.deltas):
            written = runner.arch.model(ids).logits
        assert torch.equal(runner.arch.model(ids).logits, plain)
    assert (hooked - written).norm() < 1e-5 * (written - plain).norm()


def test_the_oracle_refuses_what_was_never_published() -> None:
    runner, config = runner_of("llama"), config_of("memit", sweeps=2)
    with pytest.raises(ValueError, match="sweeps=2"):
        oracle_edit(runner.arch.model, [], config, covariances_of(runner))


@pytest.mark.parametrize("method", ["alphaedit", "memit", "rome"])
def test_the_benchmark_computes_once_what_stays_with_a_model(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the second moments is factored while an edit is timed."""
    runner, config = runner_of("llama"), config_of(method)
    covariances = covariances_of(runner)
    end_to_end.factor(config, covariances)

    def refuse(*_: object) -> None:
        raise AssertionError("factored within an edit")

    monkeypatch.setattr("patchkit.maths.covariance.leading", refuse)
    monkeypatch.setattr("torch.linalg.cholesky_ex", refuse)
    monkeypatch.setattr("torch.linalg.eigh", refuse)
    edit(runner, tiny_tokenizer(), FACTS[:2], config, covariances)


def test_the_benchmark_runs_and_finds_both_sides_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(FAMILIES["llama"](), tiny_tokenizer(), tmp_path / "model")
    facts, text = tmp_path / "facts.jsonl", tmp_path / "text.txt"
    facts.write_text("\n".join(fact.model_dump_json() for fact in FACTS))
    text.write_text("The capital of France is Paris. Alan Turing studied at Cambridge. " * 20)
    files = ["--model", str(model), "--facts", str(facts), "--text", str(text), "--eval-text", str(text)]
    settings = ["--set", "steps=3", "--set", "contexts=1", "--set", "layers=1-2"]
    settings += ["--set", "value.second_moment=full"]  # which ours alone is sought by
    monkeypatch.setattr("sys.argv", ["end_to_end", *files, *settings, "--count", "3", "--json"])
    end_to_end.main()
    found = json.loads(capsys.readouterr().out)
    assert found["facts"] == 3
    assert found["machine"]["threads"] == 1
    assert found["ratio"] == pytest.approx(found["oracle_s"] / found["ours_s"])
    assert found["target_difference"] < 1e-4
    assert found["ours"]["steps"] == found["adam"]["steps"] == found["oracle"]["steps"] == 9
    assert found["ours"]["metrics"]["perplexity"]["after"] != found["adam"]["metrics"]["perplexity"]["after"]
    ours, oracle = (found[side]["metrics"]["perplexity"] for side in ("adam", "oracle"))
    assert ours["after"] != ours["before"]
    assert ours["after"] == pytest.approx(oracle["after"], rel=1e-4)
