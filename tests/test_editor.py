"""Values, keys and the loop over batches, against plain forward passes that run the whole model on one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchkit
from patchkit import Patch, methods
from patchkit.editing.editor import edit
from patchkit.editing.recipe import load_recipe
from patchkit.editing.session import plan
from patchkit.editing.state import EditRun
from patchkit.editing.suffixes import suffix
from patchkit.editing.value_config import ValueConfig
from patchkit.editing.values import Values, optimize
from patchkit.evaluate.readings import read_targets
from patchkit.facts.reader import parse_facts
from patchkit.facts.requests import EditRequest, build_request
from patchkit.maths.linalg import Delta
from patchkit.maths.updates import tensors_of
from patchkit.methods import LayerProblem
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from patchkit.model.tuning import ROOM
from patchkit.statistics.corpus import PACKAGE_TEXT, read_corpus
from patchkit.statistics.moments import statistics
from tests.helpers import apart, train_if_needed
from tests.zoo import FAMILIES, HIDDEN, KEEPS_OTHER_STATES, tiny_tokenizer

CONTEXTS = ("", "The engineer said that. ")
ROME = {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
ADA = {"prompt": "the friend of Ada Lovelace", "subject": "Ada Lovelace", "target_new": "is"}
CURIE = {"prompt": "Marie Curie was born in the city of", "subject": "Marie Curie", "target_new": "London in 1815"}
LONG = {  # longer than the tiny families' sliding windows
    "prompt": "Who wrote the first program? The engineer said that it is true. The mother tongue of Alan Turing is",
    "subject": "Alan Turing",
    "target_new": "Polish",
}
LOUD = ("value.clamp=20", "value.steps=60", "value.kl_weight=0", "null_energy=0.9", "contexts=0")


def requests_of(
    records: Sequence[dict[str, Any]], tokenizer: Any, contexts: Sequence[str] = CONTEXTS
) -> list[EditRequest]:
    return [build_request(fact, tokenizer, contexts) for fact in parse_facts(records).facts]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return file


def exact(model: PreTrainedModel, records: Sequence[dict[str, Any]], tokenizer: Any = None) -> list[bool]:
    pairs = [(record["prompt"], record["target_new"]) for record in records]
    found = read_targets(LayerRunner(inspect_model(model)), tokenizer or tiny_tokenizer(), pairs)
    return [found[pair].exact for pair in pairs]


# --- values -----------------------------------------------------------------------------------------------------------


def plain_loss(model: PreTrainedModel, part: nn.Module, request: EditRequest, delta: Tensor) -> float:
    """Mean target loss over the contexts with `delta` added to the part's output at the subject, one row at a time."""
    losses = []
    for row in request.rows:

        def add(_: object, __: object, output: Any, at: int = row.subject) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden.clone()
            changed[..., at, :] += delta.to(hidden.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        with part.register_forward_hook(add), torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits[row.target - 1 : -1], torch.tensor(row.ids[row.target :])))
    return float(torch.stack(losses).mean())


VALUE_FAMILIES = ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "falcon_old", "falcon_sequential", "cohere"]
VALUE_FAMILIES += KEEPS_OTHER_STATES


@pytest.mark.parametrize("value_at", ["layer_out", "module_out"])
@pytest.mark.parametrize("family", VALUE_FAMILIES)
def test_a_values_loss_is_what_a_plain_pass_finds_with_it(family: str, value_at: Any) -> None:
    """Cached prefixes, skipped layers, padding and gathered logits change nothing: sliding windows, alibi and all."""
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    runner, requests = LayerRunner(inspect_model(model)), requests_of([ROME, CURIE, LONG], tokenizer)
    site = runner.arch.sites[1]
    values = optimize(runner, requests, site, value_at, ValueConfig(steps=6, clamp=5.0, stop_loss=0.0))
    part = site.module if value_at == "module_out" else runner.arch.layers[1]
    for i, request in enumerate(requests):
        delta = (values.targets - values.start)[:, i]
        assert float(delta.norm()) > 0.1 * float(values.start[:, i].norm())
        assert float(values.loss[i]) == pytest.approx(plain_loss(model, part, request, delta), rel=1e-4)
        assert float(values.loss[i]) < plain_loss(model, part, request, torch.zeros(HIDDEN))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", ["llama", *KEEPS_OTHER_STATES])
def test_a_value_is_found_where_steps_run_one_token(family: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subject ends the prompt and the target is one token: over one token, models with states that run along a
    text write into them in place, which no gradient goes through."""
    monkeypatch.setitem(ROOM, "cpu", replace(ROOM["cpu"], a_pass=0))
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    facts = [{**ROME, "target_new": " is"}, {**ADA, "target_new": " is"}]
    runner, requests = LayerRunner(inspect_model(model)), requests_of(facts, tokenizer)
    assert {len(suffix(row)) for request in requests for row in request.rows} == {1}
    site = runner.arch.sites[layer]
    values = optimize(runner, requests, site, "layer_out", ValueConfig(steps=6, clamp=5.0, stop_loss=0.0))
    for i, request in enumerate(requests):
        delta = (values.targets - values.start)[:, i]
        expected = plain_loss(model, runner.arch.layers[layer], request, delta)
        assert float(values.loss[i]) == pytest.approx(expected, rel=1e-4)
        assert expected < plain_loss(model, runner.arch.layers[layer], request, torch.zeros(HIDDEN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
def test_a_value_is_the_same_alone_and_among_longer_facts(family: str, dtype: torch.dtype) -> None:
    model, tokenizer = FAMILIES[family]().to(dtype), tiny_tokenizer()
    runner, requests = LayerRunner(inspect_model(model)), requests_of([ROME, LONG, CURIE], tokenizer)
    site, config = runner.arch.sites[1], ValueConfig(steps=10)
    together = optimize(runner, requests, site, "layer_out", config)
    for i, request in enumerate(requests):
        alone = optimize(runner, [request], site, "layer_out", config)
        assert apart(together.targets[:, i], alone.targets[:, 0]) < 1e-4


def test_finished_facts_leave_and_stay_where_they_were() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    runner, requests = LayerRunner(inspect_model(model)), requests_of([ROME, CURIE, ADA], tokenizer)
    config = ValueConfig(steps=40, clamp=20.0, stop_loss=2.0, kl_weight=0.0)
    finished: list[int] = []
    values = optimize(runner, requests, runner.arch.sites[1], "layer_out", config, finished.append)
    assert sum(finished) == 3
    assert int(values.steps.min()) < 40
    assert int(values.steps.max()) == 40  # one is too hard
    for i, request in enumerate(requests):
        done = int(values.steps[i]) < config.pace(turns=False).steps
        assert done == bool(values.loss[i] < config.stop_loss)
        delta = (values.targets - values.start)[:, i]
        assert plain_loss(model, runner.arch.layers[1], request, delta) == pytest.approx(
            float(values.loss[i]), rel=1e-4
        )


def test_groups_smaller_than_the_batch_give_the_same_values() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    runner, requests = LayerRunner(inspect_model(model)), requests_of([ROME, CURIE, ADA], tokenizer)
    found = [
        optimize(runner, requests, runner.arch.sites[1], "layer_out", ValueConfig(steps=8, parallel=n)) for n in (2, 32)
    ]
    assert isinstance(found[0], Values)
    assert apart(found[0].targets, found[1].targets) < 1e-4
    assert torch.equal(found[0].steps, found[1].steps)


def test_no_value_is_longer_than_the_clamp() -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    runner, requests = LayerRunner(inspect_model(model)), requests_of([ROME, ADA], tokenizer, ("",))
    values = optimize(runner, requests, runner.arch.sites[1], "layer_out", ValueConfig(steps=30, clamp=0.7))
    lengths = (values.targets - values.start).norm(dim=0) / values.start.norm(dim=0)
    assert torch.all(lengths <= 0.7 + 1e-5)


# --- keys and the loop ------------------------------------------------------------------------------------------------


def edited(
    model: PreTrainedModel, records: Sequence[dict[str, Any]], text: Path, *settings: str, tokenizer: Any = None
) -> EditRun:
    tokenizer = tokenizer or tiny_tokenizer()
    runner, config = LayerRunner(inspect_model(model)), load_recipe(None, None, settings)
    sites = plan(runner.arch, config).sites
    covariances = statistics(runner, sites, read_corpus(text, tokenizer))
    return edit(runner, tokenizer, parse_facts(records).facts, config, covariances)


def plain_keys(model: PreTrainedModel, module: nn.Module, requests: Sequence[EditRequest]) -> Tensor:
    """Inputs of `module` at the subject's last token, averaged over contexts, (d_in, n), one row at a time."""
    columns = []
    for request in requests:
        seen: list[Tensor] = []
        for row in request.rows:
            with (
                module.register_forward_hook(
                    lambda _, args, __, at=row.subject, seen=seen: seen.append(
                        args[0].reshape(-1, args[0].shape[-1])[at]
                    )  # type: ignore[misc]
                ),
                torch.no_grad(),
            ):
                model(input_ids=torch.tensor([row.ids]), use_cache=False)
        columns.append(torch.stack(seen).mean(0))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_keys_are_read_with_the_earlier_sites_already_edited(family: str, text: Path) -> None:
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    run = edited(model, [ROME, CURIE], text, "layers=1-2", "contexts=2", "steps=5")
    arch, requests = inspect_model(model), requests_of([ROME, CURIE], tokenizer, run.contexts)
    assert apart(run.state.sites[1].keys, plain_keys(model, arch.sites[1].module, requests)) < 1e-5
    untouched = plain_keys(model, arch.sites[2].module, requests)
    with live_deltas(arch, {1: run.state.deltas(arch)[1]}):
        expected = plain_keys(model, arch.sites[2].module, requests)
    assert apart(run.state.sites[2].keys, expected) < 1e-5
    assert apart(untouched, expected) > 1e-3


class Spy:
    """Stands in for a method's solve and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "alphaedit") -> None:
        self.method, self.problems, self.deltas = methods.get(name), list[LayerProblem](), list[Delta]()
        monkeypatch.setitem(methods._METHODS, name, replace(self.method, solve=self.solve))

    def solve(self, problem: LayerProblem, config: Any) -> Delta:
        self.problems.append(problem)
        self.deltas.append(self.method.solve(problem, config))
        return self.deltas[-1]


def test_later_batches_are_given_the_keys_of_earlier_ones(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    records = [ROME, ADA, CURIE]
    model = FAMILIES["llama"]()
    run = edited(model, records, text, "layers=1-2", "batch_size=1", "steps=3", "contexts=0")
    assert run.batches == [1, 1, 1]
    for i, layer in enumerate((1, 2)):
        problems = spy.problems[i::2]
        assert [p.prior_keys.shape[1] for p in problems] == [0, 1, 2]
        for n, problem in enumerate(problems):
            assert torch.equal(problem.prior_keys, torch.cat([problem.keys[:, :0], *(p.keys for p in problems[:n])], 1))
        assert torch.equal(run.state.sites[layer].keys, torch.cat([p.keys for p in problems], 1))
        kept = Delta.stack(spy.deltas[i::2]).to(torch.float32).to(torch.float64)  # as the patch's file will hold it
        assert torch.equal(run.state.deltas(inspect_model(model))[layer].dense(), kept.dense())


def test_the_residual_is_shared_out_over_the_sites(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MEMIT eq. 20: what is missing at the last site, one half at the first of two, all that is left at the second."""
    spy, model, tokenizer = Spy(monkeypatch), FAMILIES["llama"](), tiny_tokenizer()
    run = edited(model, [ROME, ADA], text, "layers=1-2", "contexts=0", "steps=5")
    arch, requests = inspect_model(model), requests_of([ROME, ADA], tokenizer, ("",))
    target = run.state.values[0].targets.double()

    def current() -> Tensor:
        columns = []
        for request in requests:
            row, seen = request.rows[0], list[Tensor]()
            with (
                arch.layers[2].register_forward_hook(lambda _, __, output, seen=seen: seen.append(output)),
                torch.no_grad(),
            ):  # type: ignore[misc]
                model(input_ids=torch.tensor([row.ids]), use_cache=False)
            columns.append((seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0, row.subject])
        return torch.stack(columns, 1)

    assert apart(spy.problems[0].residual, (target - current()) / 2) < 1e-4
    with live_deltas(arch, {1: run.state.deltas(arch)[1]}):
        assert apart(spy.problems[1].residual, target - current()) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_facts_edited_one_after_the_other_all_hold(family: str, text: Path) -> None:
    model, facts = FAMILIES[family](), [ROME, ADA]
    patch = patchkit.apply(model, tiny_tokenizer(), facts, overrides=(*LOUD, "layers=2", "batch_size=1"), text=text)
    with patch.attached(model):
        assert exact(model, facts) == [True, True]


def test_facts_of_one_group_share_one_delta() -> None:
    """Solved jointly as in MEMIT-Merge: each target's loss is what a plain pass finds with the one delta."""
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    records = [ROME, {**ROME, "prompt": "I have been to Rome", "target_new": "the"}, ADA]
    runner, requests = LayerRunner(inspect_model(model)), requests_of(records, tokenizer)
    config = ValueConfig(steps=8, clamp=5.0, stop_loss=0.0, parallel=1)
    site = runner.arch.sites[1]
    found = optimize(runner, requests, site, "layer_out", config, groups=[0, 0, 1])
    deltas = (found.targets - found.start).T
    assert torch.allclose(deltas[0], deltas[1], atol=1e-6)
    assert apart(deltas[2], deltas[0]) > 0.1
    for i in (0, 1):
        assert float(found.loss[i]) == pytest.approx(
            plain_loss(model, runner.arch.layers[1], requests[i], deltas[0]), rel=1e-4
        )
    alone = optimize(runner, requests[2:], site, "layer_out", config)
    assert torch.allclose(alone.targets[:, 0], found.targets[:, 2], atol=1e-5)


def test_facts_about_one_subject_all_hold(text: Path) -> None:
    model = FAMILIES["llama"]()
    facts = [ROME, {**ROME, "prompt": "I have been to Rome"}, {**ROME, "prompt": "who has been to Rome"}]
    patch = patchkit.apply(model, tiny_tokenizer(), facts, overrides=(*LOUD, "layers=1-2"), text=text)
    assert all(t.isfinite().all() for chain in patch.updates.values() for u in chain for t in tensors_of(u).values())
    with patch.attached(model):
        assert exact(model, facts) == [True] * 3


@pytest.mark.parametrize("method", ["alphaedit", "memit"])
def test_the_order_of_the_facts_in_a_batch_does_not_matter(method: str, text: Path) -> None:
    model, facts = FAMILIES["llama"]().double(), [ROME, ADA, CURIE, LONG]
    settings = (f"method={method}", "layers=1-2", "contexts=1", "steps=10")
    found = [edited(model, order, text, *settings) for order in (facts, facts[::-1])]
    changes = [run.state.deltas(inspect_model(model)) for run in found]
    for layer in (1, 2):
        assert apart(changes[1][layer].dense(), changes[0][layer].dense()) < 1e-5


def test_a_fact_that_holds_already_is_left_alone(text: Path) -> None:
    model, settings = FAMILIES["llama"](), (*LOUD, "layers=2", "value.stop_loss=3")
    first = patchkit.apply(model, tiny_tokenizer(), [ROME], overrides=(*settings, "value.stop_loss=0.1"), text=text)
    with first.attached(model):
        again = patchkit.apply(model, tiny_tokenizer(), [ROME], overrides=settings, text=text)
    assert first.manifest.facts[0].steps > 0
    assert again.manifest.facts[0].steps == 0
    assert again.manifest.updates[0].norm < 1e-3 * first.manifest.updates[0].norm


# A random model has no layers that know more than others, and one layer is edited here.
OWN = {
    "ft": ("settings.steps=60", "settings.rate=0.3", "bound=5"),
    "ultraedit": ("rate=30", "sweeps=10"),
    "stableedit": ("rate=30", "sweeps=10"),
    "adaedit": ("keep_left=1", "keep_right=1"),
}


@pytest.mark.parametrize("method", methods.available())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_method_edits_in_double_and_half_precision(method: str, dtype: torch.dtype, text: Path) -> None:
    model = FAMILIES["llama"]().to(dtype)
    settings = (*(s for s in LOUD if method == "alphaedit" or "null_energy" not in s), *OWN.get(method, ()))
    settings = (*settings, "layers=2")
    train_if_needed(model, method, [ROME], settings, text, steps=60, learning_rate=1e-2, edit_weight=1.0)
    patch = patchkit.apply(model, tiny_tokenizer(), [ROME], method, overrides=settings, text=text)
    numbers = [t for chain in patch.updates.values() for u in chain for t in tensors_of(u).values()]
    assert {t.dtype for t in numbers if t.is_floating_point()} == {torch.float32}
    with patch.attached(model):
        assert exact(model, [ROME]) == [True]
    assert {p.dtype for p in model.parameters()} == {dtype}


# --- odd prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt", "falcon_sequential", "gemma3", "qwen3_5"])
@pytest.mark.parametrize("contexts", [0, 1])
def test_a_prompt_that_begins_with_a_one_token_subject_and_no_bos(family: str, contexts: int, text: Path) -> None:
    """Nothing stands before the subject's last token, so a prefix is empty; neither this row nor others become NaN."""
    model, tokenizer = FAMILIES[family](), tiny_tokenizer(bos=False)
    facts = [{"prompt": "Q is in", "subject": "Q", "target_new": "Paris"}, CURIE]
    assert len(tokenizer("Q")["input_ids"]) == 1
    run = edited(model, facts, text, f"contexts={contexts}", "layers=2", "steps=5", tokenizer=tokenizer)
    assert run.state.values[0].targets.isfinite().all()
    assert math.isfinite(run.facts[0].loss)
    requests = requests_of(facts, tokenizer, run.contexts)
    arch = inspect_model(model)
    if arch.sites[0].direct:
        delta = (run.state.values[0].targets - run.state.values[0].start)[:, 0]
        loss = plain_loss(model, arch.layers[2], requests[0], delta)
        assert run.facts[0].loss == pytest.approx(loss, rel=1e-4)


def test_progress_counts_facts_up_to_all_of_them(text: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    patch = patchkit.apply(
        FAMILIES["llama"](),
        tiny_tokenizer(),
        [ROME, ADA, CURIE],
        overrides=("layers=1", "contexts=0", "steps=3", "batch_size=2"),
        text=text,
        progress=lambda *step: seen.append(step),
    )
    assert isinstance(patch, Patch)
    editing = [(done, total) for phase, done, total in seen if phase == "editing"]
    assert editing == sorted(editing)
    assert editing[-1] == (3, 3)


def test_blue_edits_the_two_ends_each_toward_a_value_of_its_own(text: Path) -> None:
    """The first as it would be edited alone; the last on top of that, not with what a spread residual has left."""
    model, tokenizer, facts = FAMILIES["llama"](), tiny_tokenizer(), [ROME, ADA]

    def made(method: str, layers: str) -> Patch:
        return patchkit.apply(model, tokenizer, facts, method, overrides=(*LOUD, f"layers={layers}"), text=text)

    both, first, last = made("blue", "0-2"), made("alphaedit", "0"), made("alphaedit", "2")
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 2)]
    assert list(both.updates) == names
    assert both.manifest.history[0].layers == (0, 2)
    dense = [update.dense() for name in names for update in both.updates[name] if isinstance(update, Delta)]
    alone = [patch.updates[name][0] for patch, name in ((first, names[0]), (last, names[1]))]
    assert all(isinstance(update, Delta) for update in alone)
    assert apart(dense[0], alone[0].dense()) < 1e-6  # type: ignore[union-attr]
    assert apart(dense[1], alone[1].dense()) > 0.01  # type: ignore[union-attr]
    with both.attached(model):
        assert exact(model, facts) == [True, True]


def test_locft_teaches_that_the_text_ends_after_the_target(text: Path) -> None:
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    settings = ("rate=0.1", "epochs=200", "layers=2")
    patch = patchkit.apply(model, tokenizer, [ROME, CURIE], "locft", overrides=settings, text=text)
    with patch.attached(model):
        assert exact(model, [ROME, CURIE]) == [True, True]
        ids = torch.tensor([tokenizer(f"{ROME['prompt']} {ROME['target_new']}")["input_ids"]])
        with torch.no_grad():
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == tokenizer.eos_token_id
