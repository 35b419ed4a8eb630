"""What methods may ask of the value optimizer, held against one fact at a time on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.editing.recipe import EditConfig
from patchkit.editing.session import plan
from patchkit.editing.value_config import ValueConfig
from patchkit.editing.value_problem import ValueAt, ValueTerms
from patchkit.editing.values import optimize
from patchkit.errors import InputError
from patchkit.facts.requests import EditRequest, build_request
from patchkit.facts.schema import Fact
from patchkit.model.arch import attention_of, inspect_model
from patchkit.model.forward import LayerRunner
from tests.zoo import FAMILIES, tiny_tokenizer

FACTS = [
    Fact(id=subject, prompt=f"{subject} lives in", subject=subject, target_new=target)
    for subject, target in [("Marie Curie", "Rome"), ("Ada Lovelace", "the city of Paris"), ("Alan Turing", "Italy")]
]
CONTEXTS = ["", "The engineer said. "]
CONFIG = ValueConfig(steps=5, stop_loss=0.0, parallel=2)  # three facts: a full group and one over
PULL = torch.tensor([0.0, 30.0, -20.0], dtype=torch.float64)


def on_sphere(facts: Tensor, start: Tensor, delta: Tensor) -> Tensor:
    moved = start + delta
    return moved * (start.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)) - start


def pulled(facts: Tensor, start: Tensor, delta: Tensor) -> Tensor:
    """Another weight for each fact."""
    return PULL[facts] * F.cosine_similarity(delta + 1e-3, start).abs()


TERMS = {
    "constrain": ValueTerms(constrain=on_sphere),
    "penalty": ValueTerms(penalty=pulled),
    "attention": ValueTerms(attention=True),
    "all": ValueTerms(on_sphere, pulled, True),
}


def runner_of(family: str) -> LayerRunner:
    runner = LayerRunner(inspect_model(FAMILIES[family]().double()))
    runner.arch.model.requires_grad_(False)
    return runner


def requests_of(facts: list[Fact] = FACTS) -> list[EditRequest]:
    return [build_request(fact, tiny_tokenizer(), CONTEXTS) for fact in facts]


def plainly(runner: LayerRunner, number: int, request: EditRequest, value_at: ValueAt, terms: ValueTerms) -> Tensor:
    """Target state (d,) of one fact, by torch's Adam and a pass through the whole model for every row and step."""
    layer, rows = 1, [*request.rows, request.essence]
    where = runner.arch.sites[layer].module if value_at == "module_out" else runner.arch.layers[layer]
    modules = [where, attention_of(runner.arch, layer)][: 1 + terms.attention]

    def run(deltas: Tensor) -> tuple[Tensor, list[Tensor]]:
        """States (rows, places, d) and each row's logits, with `deltas` (places, d) added."""
        states, logits = [], []
        for row in rows:
            seen: list[Tensor] = []
            with ExitStack() as stack:
                for module, delta in zip(modules, deltas, strict=True):
                    stack.enter_context(module.register_forward_hook(adding(row.subject, delta, seen)))
                logits.append(runner.arch.model(torch.tensor([row.ids]), use_cache=False).logits[0])
            states.append(torch.stack(seen if len(seen) == 1 else seen[::-1]))  # attention comes before the rest
        return torch.stack(states), logits

    states, logits = run(torch.zeros(len(modules), runner.arch.hidden_size, dtype=torch.float64))
    base, start, facts = logits[-1][-1].log_softmax(-1), states[0], torch.tensor([number])
    scale = states.norm(dim=-1).median(0).values.unsqueeze(1)  # (places, 1)
    free = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([free], lr=CONFIG.pace(turns=False).learning_rate / start.shape[-1] ** 0.5)

    def deltas_of(free: Tensor) -> Tensor:
        deltas = free * scale
        if terms.constrain is not None:
            deltas = torch.cat([terms.constrain(facts, start[:1], deltas[:1]), deltas[1:]])
        return deltas

    for _ in range(CONFIG.pace(turns=False).steps):
        deltas = deltas_of(free)
        _, logits = run(deltas)
        token_losses = [
            F.cross_entropy(logits[i][row.target - 1 : -1], torch.tensor(row.ids[row.target :]))
            for i, row in enumerate(request.rows)
        ]
        drift = F.kl_div(base, logits[-1][-1].log_softmax(-1), reduction="sum", log_target=True)
        loss = torch.stack(token_losses).mean() + CONFIG.kl_weight * drift + CONFIG.decay * free.square().sum()
        if terms.penalty is not None:
            loss = loss + terms.penalty(facts, start[:1], deltas[:1]).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            free *= (CONFIG.pace(turns=False).clamp / free.norm(dim=-1, keepdim=True)).clamp_max(1)
    return (start + deltas_of(free))[0].detach()


def adding(position: int, delta: Tensor, seen: list[Tensor]) -> Callable[..., Any]:
    def hook(module: object, args: object, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        flat = whole.reshape(-1, whole.shape[-1]).clone()  # one row, which some blocks flatten
        seen.append(flat[position].detach().clone())
        flat[position] += delta
        moved = flat.view_as(whole)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return hook


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("family", "value_at"), [("llama", "layer_out"), ("gemma3", "module_out")])
def test_values_with_terms_equal_the_plain_procedures(family: str, value_at: ValueAt, name: str) -> None:
    runner, requests = runner_of(family), requests_of()
    site = runner.arch.sites[1]
    ours = optimize(runner, requests, site, value_at, CONFIG, terms=TERMS[name]).targets
    without = optimize(runner, requests, site, value_at, CONFIG).targets
    for i, request in enumerate(requests):
        expected = plainly(runner, i, request, value_at, TERMS[name])
        assert (ours[:, i] - expected).norm() < 1e-7 * expected.norm()
        if not (name == "penalty" and PULL[i] == 0):
            assert (ours[:, i] - without[:, i]).norm() > 1e-4 * expected.norm()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon_old", "opt", "gptj", "starcoder2"])
def test_attention_is_found_and_optimized_along_in_every_layout(family: str) -> None:
    runner, terms = runner_of(family), ValueTerms(attention=True)
    request = requests_of()[1]
    found = optimize(runner, [request], runner.arch.sites[1], "layer_out", CONFIG, terms=terms).targets[:, 0]
    expected = plainly(runner, 0, request, "layer_out", terms)
    assert (found - expected).norm() < 1e-7 * expected.norm()


def test_values_on_a_sphere_keep_the_norm_of_their_start() -> None:
    runner = runner_of("llama")
    found = optimize(
        runner, requests_of(), runner.arch.sites[1], "module_out", CONFIG, terms=ValueTerms(constrain=on_sphere)
    )
    assert torch.allclose(found.targets.norm(dim=0), found.start.norm(dim=0), rtol=1e-9)
    assert ((found.targets - found.start).norm(dim=0) > 0.05 * found.start.norm(dim=0)).all()


def test_default_terms_change_nothing() -> None:
    runner, requests = runner_of("llama"), requests_of()
    site = runner.arch.sites[1]
    with_terms = optimize(runner, requests, site, "layer_out", CONFIG, terms=ValueTerms())
    assert torch.equal(with_terms.targets, optimize(runner, requests, site, "layer_out", CONFIG).targets)


def test_a_layer_with_two_attentions_is_refused() -> None:
    arch = runner_of("llama").arch
    arch.layers[0].cross_attn = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="one attention module"):
        attention_of(arch, 0)


@pytest.mark.parametrize("method", ["pmet", "adaedit"])
def test_a_layer_without_the_attention_that_a_method_needs_is_refused_before_anything_is_computed(method: str) -> None:
    arch = runner_of("lfm2").arch
    assert plan(arch, EditConfig(method=method, layers="2-3")).layers == [3]  # the last layer is edited by itself
    with pytest.raises(InputError, match=r"one attention module in layer 2, found 0; .* whose last one has it: 1, 3"):
        plan(arch, EditConfig(method=method, layers="1-2"))


def test_facts_about_one_subject_need_not_stand_together() -> None:
    """Each keeps the state that it started from, wherever in the batch the others of its subject are."""
    runner, (curie, ada, turing) = runner_of("llama"), FACTS
    again = Fact(id="again", prompt=f"{curie.subject} was born in", subject=curie.subject, target_new="Italy")
    apart, together = requests_of([curie, ada, turing, again]), requests_of([curie, again, ada, turing])
    site = runner.arch.sites[1]
    found = optimize(runner, apart, site, "layer_out", CONFIG.model_copy(update={"parallel": 4}), groups=[0, 1, 2, 0])
    expected = optimize(
        runner, together, site, "layer_out", CONFIG.model_copy(update={"parallel": 4}), groups=[0, 0, 2, 3]
    ).of([0, 2, 3, 1])
    for name in ("start", "targets", "loss"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-6), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_values_at_several_layers_are_those_sought_layer_by_layer(family: str) -> None:
    """Also at the last layer's output, above which no layer runs."""
    runner, requests, layers = runner_of(family), requests_of(), [3, 1, 2]
    site_of = {site.layer: site for site in runner.arch.sites}
    together = optimize(runner, requests, site_of[1], "layer_out", CONFIG, layers=layers)
    for fact, layer in enumerate(layers):
        alone = optimize(runner, [requests[fact]], site_of[layer], "layer_out", CONFIG)
        assert torch.allclose(together.targets[:, fact], alone.targets[:, 0])
        assert torch.allclose(together.start[:, fact], alone.start[:, 0])
