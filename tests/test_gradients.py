"""Gradients: what autograd finds for whole weights, the methods that go by them, and going on from a patch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchkit
from patchkit import methods
from patchkit.cli import cli
from patchkit.editing.editor import frozen
from patchkit.editing.gradients import TargetLoss
from patchkit.errors import InputError
from patchkit.facts.reader import parse_facts
from patchkit.facts.requests import EditRequest, build_request
from patchkit.maths.linalg import Delta, PriorKeys
from patchkit.maths.updates import Full
from patchkit.methods import LayerProblem
from patchkit.methods.ft import FTConfig, ft
from patchkit.methods.ultraedit import UltraEditConfig, normalized, ultraedit
from patchkit.model.arch import inspect_model
from patchkit.model.forward import LayerRunner
from patchkit.model.weights import oriented, read_weight
from patchkit.patch.patch import Patch
from patchkit.statistics import passes
from patchkit.statistics import text_gradients as text_gradients_module
from patchkit.statistics.corpus import PACKAGE_TEXT, Corpus, read_corpus
from patchkit.statistics.text_gradients import TextGradient, text_curvatures, text_gradients
from tests.helpers import apart
from tests.zoo import FAMILIES, save, tiny_tokenizer

ROME = {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"}
ADA = {"prompt": "the friend of Ada Lovelace", "subject": "Ada Lovelace", "target_new": "is"}
CURIE = {"prompt": "Marie Curie was born in the city of", "subject": "Marie Curie", "target_new": "London in 1815"}
FACTS = [ROME, ADA, CURIE]
CONTEXTS = ("", "The engineer said that. ")
WITH_TRANSPOSED_AND_FLATTENED = ["llama", "gpt2", "opt", "gemma3"]


def requests_of(records: Sequence[dict[str, Any]], contexts: Sequence[str] = CONTEXTS) -> list[EditRequest]:
    return [build_request(fact, tiny_tokenizer(), contexts) for fact in parse_facts(records).facts]


def plain_losses(model: PreTrainedModel, requests: Sequence[EditRequest]) -> Tensor:
    """Each fact's loss, the mean over its rows, one row at a time."""
    losses = []
    for request in requests:
        rows = []
        for row in request.rows:
            logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
            rows.append(F.cross_entropy(logits[row.target - 1 : -1], torch.tensor(row.ids[row.target :])))
        losses.append(torch.stack(rows).mean())
    return torch.stack(losses)


def weight_gradient(model: PreTrainedModel, layer: int, loss: Callable[[], Tensor]) -> Tensor:
    """dL/dW of the layer's site by autograd, (d_out, d_in)."""
    site = inspect_model(model).sites[layer]
    (found,) = torch.autograd.grad(loss(), [next(p for n, p in site.module.named_parameters() if n == "weight")])
    return oriented(site.module, found)


# --- facts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 2, 8])
@pytest.mark.parametrize("family", WITH_TRANSPOSED_AND_FLATTENED)
def test_the_loss_and_its_gradient_are_autograds(family: str, parallel: int) -> None:
    """At the last layer a loss depends on nothing but the positions that predict targets, so G K' is the whole."""
    model, requests = FAMILIES[family]().double(), requests_of(FACTS)
    runner = LayerRunner(inspect_model(model))
    sites = [runner.arch.sites[i] for i in (1, 3)]
    expected = weight_gradient(model, 3, lambda: plain_losses(model, requests).sum())
    with frozen(model):
        loss = TargetLoss(runner, requests, parallel)
        found = loss.gradients(sites)
        assert torch.allclose(found.loss, plain_losses(model, requests).double(), rtol=1e-9)
        assert torch.equal(found.loss, loss.per_fact())
    assert found.keys[1].shape[1] == sum(loss.columns)
    assert apart(found.gradients[3] @ found.keys[3].T, expected) < 1e-9


def test_columns_are_the_positions_that_predict_targets_fact_by_fact() -> None:
    model, requests = FAMILIES["llama"](), requests_of(FACTS)
    runner = LayerRunner(inspect_model(model))
    with frozen(model):
        loss = TargetLoss(runner, requests, 2)
        together = loss.gradients(runner.arch.sites[1:2])
        alone = [TargetLoss(runner, [request], 2).gradients(runner.arch.sites[1:2]) for request in requests]
    assert loss.columns == [sum(len(row.ids) - row.target for row in request.rows) for request in requests]
    assert len(set(loss.columns)) > 1
    for name in ("keys", "gradients"):
        parts = [getattr(each, name)[1] for each in alone]
        assert apart(getattr(together, name)[1], torch.cat(parts, 1)) < 1e-5


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("family", [*WITH_TRANSPOSED_AND_FLATTENED, "gemma4"])  # whose layer 3 reads what 2 keeps
def test_the_loss_of_a_change_and_its_gradient_are_those_of_a_changed_weight(family: str, layer: int) -> None:
    model, requests = FAMILIES[family]().double(), requests_of(FACTS)
    runner = LayerRunner(inspect_model(model))
    site = runner.arch.sites[layer]
    change = 0.05 * torch.randn(site.d_out, site.d_in, generator=torch.Generator().manual_seed(0)).double()
    with frozen(model):
        loss = TargetLoss(runner, requests, 2).at(site)
        found = [loss(None), loss(change)]
    for (value, gradient), step in zip(found, (0, 1), strict=True):
        read_weight(site).add_(step * change)
        assert value == pytest.approx(float(plain_losses(model, requests).mean()), rel=1e-9)
        expected = weight_gradient(model, layer, lambda: plain_losses(model, requests).mean())
        assert apart(gradient, expected) < 1e-6  # some norms run in float32
    assert found[0][0] != found[1][0]
    assert not change.requires_grad


# --- plain text -------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Some twenty windows in three batches, the last window shorter."""
    monkeypatch.setattr(passes, "BATCH", 8 * 96)
    monkeypatch.setattr(text_gradients_module, "WINDOW", 96)
    file = tmp_path / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2500], encoding="utf-8")
    return read_corpus(file, tiny_tokenizer(), window=96)


def of_text(model: PreTrainedModel, corpus: Corpus, folder: Path, **more: Any) -> dict[int, TextGradient]:
    runner = LayerRunner(inspect_model(model))
    with frozen(model):
        return text_gradients(runner, [runner.arch.sites[i] for i in (0, 2)], corpus, folder, **more)


@pytest.mark.parametrize("family", WITH_TRANSPOSED_AND_FLATTENED)
def test_a_texts_gradient_is_autograds(family: str, corpus: Corpus, tmp_path: Path) -> None:
    model = FAMILIES[family]()

    def loss() -> Tensor:
        total = torch.zeros(())
        for window in corpus.windows:
            ids = torch.tensor([window])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
        return total / corpus.tokens

    for layer, found in of_text(model, corpus, tmp_path / "s").items():
        expected = weight_gradient(model, layer, loss).double()
        left, values, _ = torch.linalg.svd(expected, full_matrices=False)
        assert apart(found.values, values[: len(found.values)]) < 1e-4
        leading = left[:, :5]  # up to signs, and to what float32 makes of close singular values
        assert apart(found.left[:, :5].T @ leading, torch.diag((found.left[:, :5] * leading).sum(0).sign())) < 1e-2


@pytest.mark.parametrize("family", WITH_TRANSPOSED_AND_FLATTENED)
def test_a_texts_curvature_is_the_second_moment_of_autograds_gradients(
    family: str, corpus: Corpus, tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    runner, width = LayerRunner(inspect_model(model)), model.config.vocab_size
    site, expected = runner.arch.sites[2], torch.zeros(())
    for window in corpus.windows:
        ids, seen = torch.tensor([window]), list[Tensor]()
        handle = site.module.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        logits = model(input_ids=ids, use_cache=False).logits
        handle.remove()
        loss = F.cross_entropy(logits[0, :-1].view(-1, width), ids[0, 1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, seen[0])
        flat = gradient.reshape(-1, gradient.shape[-1]).double()
        expected = expected + flat.T @ flat / corpus.tokens
    with frozen(model):
        found = text_curvatures(runner, [site], corpus, tmp_path / "s")
        again = text_curvatures(runner, [site], corpus, tmp_path / "s", progress=pytest.fail)
    assert apart(found[2], expected) < 1e-5
    assert torch.equal(found[2], again[2])


def test_a_texts_gradient_is_computed_once_and_again_for_other_weights_above(corpus: Corpus, tmp_path: Path) -> None:
    model, calls = FAMILIES["llama"](), list[int]()

    def count(done: int, total: int) -> None:
        calls.append(done)

    first = of_text(model, corpus, tmp_path, progress=count)
    assert calls[-1] == corpus.tokens
    calls.clear()
    again = of_text(model, corpus, tmp_path, progress=count)
    assert not calls
    assert torch.equal(first[0].left, again[0].left)
    with torch.no_grad():
        inspect_model(model).layers[3].mlp.up_proj.weight.mul_(1.5)
    other = of_text(model, corpus, tmp_path, progress=count)
    assert calls
    assert not torch.equal(first[0].left, other[0].left)


def test_an_interrupted_gradient_goes_on_where_it_stopped(corpus: Corpus, tmp_path: Path) -> None:
    model, seen = FAMILIES["llama"](), list[int]()

    def stop_in_the_second_of_three(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    whole = of_text(model, corpus, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        of_text(model, corpus, tmp_path / "s", progress=stop_in_the_second_of_three)
    found = of_text(model, corpus, tmp_path / "s", progress=lambda done, total: seen.append(done))
    assert len(seen) == 3
    assert seen[0] > 0
    assert all(torch.equal(found[layer].left, whole[layer].left) for layer in whole)


def test_a_long_text_counts_by_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Corpus) -> None:
    monkeypatch.setattr(text_gradients_module, "TEXT_TOKENS", 200)
    model, beginning = FAMILIES["llama"](), replace(corpus, windows=corpus.windows[:2])
    assert corpus.tokens > 400
    found, expected = of_text(model, corpus, tmp_path / "a"), of_text(model, beginning, tmp_path / "b")
    assert torch.equal(found[2].left, expected[2].left)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = save(FAMILIES["llama"](), tiny_tokenizer(), tmp_path / "model")
    (folder / "patchkit-text.txt").write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2500], encoding="utf-8")
    return folder


def test_gradients_made_ahead_are_what_apply_and_revert_hand_to_the_method(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["stats", "--model", str(checkpoint), "--layers", "1-2", "--gradients", "--out", str(tmp_path / "s")]
    ended = CliRunner().invoke(cli, arguments)
    assert ended.exit_code == 0, ended.output
    assert re.findall(r"layers\.(\d)\..* gradient of rank (\d+)", ended.output) == [("1", "32"), ("2", "32")]

    seen: dict[str, list[LayerProblem]] = {"apply": [], "revert": []}
    asking, now = replace(methods.get("memit"), needs_gradients=True), "apply"

    def spy(problem: LayerProblem, config: Any) -> Any:
        seen[now].append(problem)
        return asking.solve(problem, config)

    monkeypatch.setitem(methods._METHODS, "memit", replace(asking, solve=spy))

    def not_again(phase: str, done: int, total: int) -> None:
        assert phase not in ("statistics", "gradients"), "computed again"

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    settings = ("layers=1-2", "contexts=0", "steps=2")
    options: dict[str, Any] = {"stats": tmp_path / "s", "progress": not_again}
    patch = patchkit.apply(model, tiny_tokenizer(), [ROME, ADA], "memit", overrides=settings, **options)
    now = "revert"
    patchkit.revert(model, tiny_tokenizer(), patch, [patch.manifest.facts[0].id], **options)
    corpus = read_corpus(checkpoint / "patchkit-text.txt", tiny_tokenizer())
    runner = LayerRunner(inspect_model(model))
    expected = text_gradients(runner, runner.arch.sites[1:3], corpus, tmp_path / "s")
    for problems in seen.values():
        layers = [next(i for i, each in expected.items() if torch.equal(p.gradient, each.left)) for p in problems]
        assert set(layers) == {1, 2}


# --- UltraEdit --------------------------------------------------------------------------------------------------------

D_OUT, D_IN = 12, 20


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem_of(columns: int, before: int) -> LayerProblem:
    weight, keys, residual = random(D_OUT, D_IN), random(D_IN, columns, seed=1) + 1, random(D_OUT, columns, seed=2)
    earlier = (random(D_IN, before, seed=3) + 1, random(D_OUT, before, seed=4))
    return LayerProblem(keys, residual, None, PriorKeys(earlier[0]), lambda: weight, gradient_columns=lambda: earlier)


@pytest.mark.parametrize(("columns", "before"), [(3, 0), (5, 7), (D_IN + 6, 7)])
def test_ultraedit_equals_its_formula(columns: int, before: int) -> None:
    """As published, but for the units of its two numbers: z = (x - μ)/σ, v = -η‖h‖²g, Δ' = (H'H + c·I)⁻¹H'V."""
    config, problem = UltraEditConfig(rate=0.7, ridge=0.05, warm_up=0), problem_of(columns, before)
    features = torch.cat([problem.keys, problem.residual]).T  # (n, d_in + d_out)
    every = torch.cat([torch.cat(problem.prior_gradients).T, features])
    normal = (features - every.mean(0)) / every.std(0)
    h, g = normal[:, :D_IN], normal[:, D_IN:]
    raw = features[:, :D_IN]
    eta = 0.7 * (raw @ problem.weight.T).square().sum(1).mean().sqrt() / (D_IN * D_OUT**0.5)
    v = -eta * h.square().sum(1, keepdim=True) * g
    system = raw.T @ raw + 0.05 * raw.square().sum(1).mean() * torch.eye(D_IN)
    expected = torch.linalg.inv(system) @ raw.T @ v
    assert apart(ultraedit(problem, config).dense(), expected.T) < 1e-6


def test_the_running_normalization_is_that_of_one_pass_over_all() -> None:
    every = random(7, 30) * torch.arange(1, 8).double()[:, None] + 2
    for warm_up in (0.0, 5.0):
        whole = normalized(every, every[:, :0], warm_up)
        assert apart(normalized(every[:, 20:], every[:, :20], warm_up), whole[:, 20:]) < 1e-12
    assert apart(whole.mean(1) + 1, torch.ones(7).double()) < 1  # pulled to zero, but not there
    plain = normalized(every, every[:, :0], 0.0)
    assert apart(plain.mean(1) + 1, torch.ones(7).double()) < 1e-12
    assert apart(plain.std(1), torch.ones(7).double()) < 1e-6


def test_a_first_column_alone_moves_something_only_after_a_warm_up() -> None:
    one = random(7, 1)
    assert not normalized(one, one[:, :0], 0.0).any()
    assert torch.equal(normalized(one, one[:, :0], 5.0).sign(), one.sign())


# --- FT ---------------------------------------------------------------------------------------------------------------


def quadratic(wanted: Tensor) -> LayerProblem:
    """Half the squared distance from the weight to `wanted`."""
    weight = random(D_OUT, D_IN)

    def loss(update: Any) -> tuple[float, Tensor]:
        left = weight + (0 if update is None else update.matrix) - wanted
        return float(left.square().sum() / 2), left

    nothing = torch.zeros(D_IN, 0).double(), torch.zeros(D_OUT, 0).double()
    return LayerProblem(*nothing, None, PriorKeys(nothing[0]), lambda: weight, loss=loss)


def test_no_entry_moves_further_than_the_bound_and_one_within_it_gets_where_it_should() -> None:
    weight = random(D_OUT, D_IN)
    size = float(weight.square().mean().sqrt())
    wanted = weight + size * torch.linspace(-0.2, 0.2, D_IN)
    config = FTConfig(steps=300, rate=2e-3, bound=0.1, stop_loss=0)
    moved = ft(quadratic(wanted), config).matrix / size
    assert float(moved.abs().max()) == pytest.approx(0.1)
    assert torch.allclose(moved, torch.linspace(-0.2, 0.2, D_IN).double().clamp(-0.1, 0.1).expand(D_OUT, -1), atol=1e-3)


def test_it_stops_once_the_loss_is_low_enough() -> None:
    weight = random(D_OUT, D_IN)
    assert not ft(quadratic(weight), FTConfig(stop_loss=1e-3)).matrix.any()


# --- editing ----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "ultraedit": ("layers=1-3", "batch_size=2", "contexts=1", "rate=0.5"),
    "ft": ("layers=2", "batch_size=2", "contexts=1", "steps=5", "bound=0.5", "settings.rate=0.1"),
}


def applied(method: str, facts: Sequence[dict[str, Any]], onto: Patch | None = None) -> Patch:
    model = FAMILIES["llama"]()
    return patchkit.apply(model, tiny_tokenizer(), facts, method, onto=onto, overrides=SETTINGS[method])


def changes(patch: Patch) -> dict[int, Delta]:
    return patch.on(inspect_model(FAMILIES["llama"]()))


def efficacy(patch: Patch, facts: Sequence[dict[str, Any]]) -> list[float]:
    model = FAMILIES["llama"]()
    with patch.attached(model), torch.no_grad():
        return plain_losses(model, requests_of(facts, patch.manifest.history[-1].contexts)).tolist()


@pytest.mark.parametrize("method", SETTINGS)
def test_the_targets_become_likelier_by_as_much_as_the_patch_says(method: str) -> None:
    patch = applied(method, FACTS[:2])
    model = FAMILIES["llama"]()
    with torch.no_grad():
        before = plain_losses(model, requests_of(FACTS[:2], patch.manifest.history[-1].contexts)).tolist()
    after = efficacy(patch, FACTS[:2])
    assert [fact.target_loss for fact in patch.manifest.facts] == pytest.approx(after, rel=1e-4)
    assert all(b < a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", SETTINGS)
def test_going_on_is_the_same_as_one_run(method: str, tmp_path: Path) -> None:
    applied(method, FACTS[:2]).save(tmp_path / "p")
    whole, onward = applied(method, FACTS), applied(method, FACTS[2:], onto=Patch.load(tmp_path / "p"))
    for layer, change in changes(whole).items():
        assert apart(changes(onward)[layer].dense(), change.dense()) < 1e-5
    assert [fact.columns for fact in onward.manifest.facts] == [fact.columns for fact in whole.manifest.facts]


def test_a_fact_taken_out_of_an_ultraedit_patch_is_as_if_it_had_not_been_there(tmp_path: Path) -> None:
    patch = applied("ultraedit", FACTS)
    patch.save(tmp_path / "p")
    last = patch.manifest.facts[-1].id
    less = patchkit.revert(FAMILIES["llama"](), tiny_tokenizer(), Patch.load(tmp_path / "p"), [last])
    for layer, change in changes(applied("ultraedit", FACTS[:2])).items():
        assert apart(changes(less)[layer].dense(), change.dense()) < 1e-5
    none = patchkit.revert(FAMILIES["llama"](), tiny_tokenizer(), less, [f.id for f in less.manifest.facts])
    assert not none.updates


def test_a_method_by_gradients_needs_no_subject_and_others_do() -> None:
    plain = [{"prompt": fact["prompt"], "target_new": fact["target_new"]} for fact in FACTS[:2]]
    patch, with_subjects = applied("ultraedit", plain), applied("ultraedit", FACTS[:2])
    for layer, change in changes(with_subjects).items():
        assert torch.equal(changes(patch)[layer].dense(), change.dense())
    onward = applied("ultraedit", [{"prompt": CURIE["prompt"], "target_new": "Rome"}], onto=patch)
    assert [fact.prompt for fact in onward.manifest.facts] == [fact["prompt"] for fact in FACTS]
    with pytest.raises(InputError, match=r"facts\[0\]: .*subject.*missing"):
        patchkit.apply(FAMILIES["llama"](), tiny_tokenizer(), plain, "memit")


def test_gradients_of_other_methods_residuals_do_not_count(tmp_path: Path) -> None:
    """AlphaEdit's residuals stand beside UltraEdit's gradients, and only the latter are normalized by."""
    model, text = FAMILIES["llama"](), tmp_path / "text.txt"
    text.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2500], encoding="utf-8")
    first = patchkit.apply(
        model, tiny_tokenizer(), [ROME], overrides=("layers=1-2", "contexts=1", "steps=3"), text=text
    )
    seen: list[LayerProblem] = []
    chosen = methods.get("ultraedit")

    def spy(problem: LayerProblem, config: Any) -> Any:
        seen.append(problem)
        return chosen.solve(problem, config)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(methods._METHODS, "ultraedit", replace(chosen, solve=spy))
        settings = ("layers=1-2", "batch_size=1", "contexts=1", "sweeps=1")
        patchkit.apply(model, tiny_tokenizer(), [ADA, CURIE], "ultraedit", onto=first, overrides=settings, text=text)
    before, after = seen[0], seen[2]  # two sites each
    assert before.prior_keys.shape[1] == 1
    assert before.prior_gradients[0].shape[1] == 0
    assert torch.equal(after.prior_gradients[0], before.keys)
    assert torch.equal(after.prior_gradients[1], before.residual)


@pytest.mark.parametrize("onto", [None, "ultraedit"])
def test_what_was_fine_tuned_cannot_be_taken_out_and_says_so(onto: str | None) -> None:
    earlier = applied("ultraedit", FACTS[:1]) if onto else None
    patch = applied("ft", FACTS[1:], onto=earlier)
    for fact in patch.manifest.facts:
        with pytest.raises(InputError, match=rf"run {1 + bool(onto)} fine-tuned layer 2 \(ft\).* to the base anew"):
            patchkit.revert(FAMILIES["llama"](), tiny_tokenizer(), patch, [fact.id])


def test_a_fine_tuned_patch_is_stored_whole(tmp_path: Path) -> None:
    patch = applied("ft", FACTS)
    patch.save(tmp_path / "p")
    (chain,) = Patch.load(tmp_path / "p").updates.values()
    assert [type(update) for update in chain] == [Full]
    assert patch.manifest.updates[0].kind == "full"
