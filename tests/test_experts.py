"""Mixtures of experts: found by looking, read and written slice by slice, patched and solved for as one wide matrix."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.evaluate.routing import choices, kept
from patchkit.maths.blocks import compact, joined, split
from patchkit.maths.covariance import Covariance, SideBySide
from patchkit.maths.linalg import Delta, PriorKeys
from patchkit.maths.rotations import Rotation
from patchkit.maths.updates import Full, Sparse, delta_of
from patchkit.methods import LayerProblem, get
from patchkit.model.arch import Architecture, inspect_model
from patchkit.model.digests import weight_digest
from patchkit.model.expert_names import expert_sites, split_name
from patchkit.model.forward import LayerRunner
from patchkit.model.hooks import live_deltas
from patchkit.model.inputs import SiteInput, watching_site
from patchkit.model.separate_experts import SeparateExperts
from patchkit.model.stacked_experts import StackedExperts
from patchkit.model.weights import Site, read_weight, write_weight
from patchkit.statistics.corpus import PACKAGE_TEXT, read_corpus
from patchkit.statistics.expert_moments import of_experts
from patchkit.statistics.moments import FIRST, statistics
from tests import zoo
from tests.helpers import apart

TOKENS = torch.arange(4, 28).view(2, 12)
every_mixture = pytest.mark.parametrize("family", zoo.MIXTURES)
SHAPES = {  # by family: experts, their width, layers that have them
    "mixtral": (4, 80, (0, 1, 2, 3)),
    "qwen2_moe": (4, 48, (0, 1, 2, 3)),
    "qwen3_moe": (6, 24, (0, 2, 3)),
    "separate_moe": (6, 24, (0, 2, 3)),
    "olmoe": (4, 80, (0, 1, 2, 3)),
    "granite_moe": (4, 80, (0, 1, 2, 3)),
    "gpt_oss": (4, 80, (0, 1, 2, 3)),
    "deepseek_v3": (8, 24, (1, 2, 3)),
    "llama4": (4, 24, (1, 3)),
    "qwen3_next": (4, 24, (0, 1, 2, 3)),
}


@cache
def inspected(family: str) -> Architecture:
    """Shared by tests that leave the model as it is."""
    return inspect_model(zoo.MIXTURES[family]())


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def parts(arch: Architecture, site: Site) -> tuple[Site, ...]:
    assert isinstance(arch.model, PreTrainedModel)
    return expert_sites(arch.model, site)


# --- finding ----------------------------------------------------------------------------------------------------------


@every_mixture
def test_experts_are_found_where_they_are(family: str) -> None:
    arch = inspected(family)
    count, width, layers = SHAPES[family]
    assert tuple(site.layer for site in arch.sites if site.blocks > 1) == layers
    assert [site.layer for site in arch.sites] == list(range(zoo.LAYERS))
    for site in arch.sites:
        assert site.d_out == zoo.HIDDEN
        if site.layer in layers:
            assert (site.blocks, site.width, site.d_in) == (count, width, count * width)
            assert isinstance(site.experts, SeparateExperts if family == "separate_moe" else StackedExperts)
            assert getattr(site.experts, "transposed", False) == (family in ("gpt_oss", "llama4"))
            assert bool(getattr(site.experts, "silenced", ())) == (family == "gpt_oss")
        assert site.direct == (family != "granite_moe")


@every_mixture
def test_inspecting_leaves_the_model_as_it_was(family: str) -> None:
    model = zoo.MIXTURES[family]()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    before = logits(model)
    inspect_model(model)
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model), before)


@every_mixture
def test_an_expert_is_named_as_in_the_checkpoint(family: str, tmp_path: Path) -> None:
    model = zoo.MIXTURES[family]()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for reloaded in (model, type(model).from_pretrained(tmp_path)):
        arch = inspect_model(reloaded)
        for site in (site for site in arch.sites if site.blocks > 1):
            for part in parts(arch, site):
                name, number = split_name(part.weight_name)
                found = stored[name] if number is None else stored[name][number]
                assert number in (None, part.expert)
                weight = read_weight(part)
                assert torch.equal(found if found.shape == weight.shape else found.T, weight)


@every_mixture
@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
def test_the_output_is_w_x(family: str, how: str) -> None:
    """The key x of every token, times the experts' weights side by side, is what the experts put out, whatever
    implementation of them runs, less their biases."""
    arch, zero = inspected(family), inspect_model(zoo.MIXTURES[family]())
    for each in (arch, zero):
        each.model.config._experts_implementation = how  # type: ignore[union-attr, assignment]
    seen: list[tuple[SiteInput, Tensor, Tensor]] = []
    site = next(site for site in arch.sites if site.blocks > 1)
    bare = zero.sites[site.layer]
    write_weight(bare, torch.zeros(bare.d_out, bare.d_in))  # what it puts out now is its biases
    rows, positions = torch.arange(2).repeat_interleave(12), torch.arange(12).repeat(2)

    def note(keys: SiteInput, output: Tensor) -> None:
        seen.append((keys, output, keys.at(rows, positions).view(2, 12, -1)))

    for each in (site, bare):
        runner = LayerRunner(arch if each is site else zero)
        with torch.no_grad(), watching_site(each, 2, note):
            runner.run({"input_ids": TOKENS, "use_cache": False}, stop=site.layer + 1)
    (keys, output, x), (_, biases, _) = seen
    weight = read_weight(site)
    assert apart(x @ weight.T, output - biases) < 1e-5
    assert apart(keys.through(weight), output - biases) < 1e-5
    gradient = torch.randn(2, 12, zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
    assert apart(keys.against(gradient), gradient.flatten(0, 1).T @ x.flatten(0, 1)) < 1e-5
    chosen = (x.unflatten(2, (site.blocks, -1)) != 0).any(3).sum(2)
    assert chosen.unique().tolist() == [1 if family == "llama4" else 2]


# --- reading, writing, attaching --------------------------------------------------------------------------------------


@every_mixture
def test_one_expert_is_written_and_put_back(family: str) -> None:
    arch = inspect_model(zoo.MIXTURES[family]())
    site = next(site for site in reversed(arch.sites) if site.blocks > 1)
    part, before, whole = parts(arch, site)[1], logits(arch.model), read_weight(site)  # type: ignore[arg-type]
    original, digest = read_weight(part).clone(), weight_digest(part, part.weight_name)
    assert torch.equal(whole.unflatten(1, (site.blocks, -1))[:, 1], original)
    write_weight(part, torch.randn(part.d_out, part.d_in, dtype=torch.float64))
    changed = read_weight(site)
    assert not torch.equal(changed, whole)
    assert torch.equal(changed.unflatten(1, (site.blocks, -1))[:, 2:], whole.unflatten(1, (site.blocks, -1))[:, 2:])
    assert weight_digest(part, part.weight_name) != digest
    write_weight(site, whole)
    assert weight_digest(part, part.weight_name) == digest
    assert torch.equal(logits(arch.model), before)  # type: ignore[arg-type]


@every_mixture
def test_an_attached_delta_is_the_written_one(family: str) -> None:
    arch = inspect_model(zoo.MIXTURES[family]())
    generator = torch.Generator().manual_seed(0)
    sites = [site for site in arch.sites if site.blocks > 1][:2]
    deltas: dict[int, Delta | None] = {}
    for site in sites:
        right = torch.randn(3, site.blocks, site.width, generator=generator)
        right[:, 0] = 0  # one expert stays as it is
        deltas[site.layer] = Delta(0.05 * torch.randn(site.d_out, 3, generator=generator), right.flatten(1))
    before = logits(arch.model)  # type: ignore[arg-type]
    with live_deltas(arch, deltas):
        attached = logits(arch.model)  # type: ignore[arg-type]
    assert torch.equal(logits(arch.model), before)  # type: ignore[arg-type]
    for site in sites:
        write_weight(site, read_weight(site) + deltas[site.layer].dense())  # type: ignore[union-attr]
    written = logits(arch.model)  # type: ignore[arg-type]
    assert (attached - before).abs().max() > 1e-2
    assert apart(attached - before, written - before) < 1e-4


# --- statistics and routing -------------------------------------------------------------------------------------------


def test_second_moments_are_each_experts_with_its_gates(tmp_path: Path) -> None:
    arch = inspected("mixtral")
    site, experts = arch.sites[1], arch.model.model.layers[1].mlp.experts  # type: ignore[union-attr, index]
    file = tmp_path / "text.txt"
    file.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2500], encoding="utf-8")
    corpus = read_corpus(file, zoo.tiny_tokenizer(), window=16)
    found = statistics(LayerRunner(arch), [site], corpus, tmp_path / "stats")[1]
    sums, counts, total = torch.zeros(4, 80, 80, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 0.0
    for window in corpus.windows:
        calls: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.no_grad(), experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args)):
            arch.model(input_ids=torch.tensor([window]), use_cache=False)  # type: ignore[operator]
        hidden, index, gates = calls[0]
        for token, (x, chosen, own) in enumerate(zip(hidden, index, gates, strict=True)):
            weight = FIRST if token == 0 else 1.0
            total += weight
            for expert, gate in zip(chosen.tolist(), own, strict=True):
                opened, amount = (experts.gate_up_proj[expert] @ x).detach().chunk(2)
                key = (gate * F.silu(opened) * amount).double()
                sums[expert] += weight * key.outer(key)
                counts[expert] += weight
    assert isinstance(found, SideBySide)
    few = [expert for expert in range(4) if counts[expert] < 80]
    assert found.few == tuple(few)
    for expert in range(4):
        wanted = sums[expert] / total
        if expert in few:
            lacking = (80 - counts[expert]) * sums.sum(0) / counts.sum()
            wanted = (sums[expert] + lacking) / 80 * counts[expert].clamp_min(1) / total
        assert apart(found.matrix[expert], wanted) < 1e-5
    again = statistics(LayerRunner(arch), [site], corpus, tmp_path / "stats")[1]
    assert torch.equal(again.matrix, found.matrix)


def test_an_expert_without_tokens_counts_as_the_others_do_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 50, 4, generator=generator, dtype=torch.float64)
    keys[2] = 0
    homogeneous = torch.cat([keys, torch.ones(3, 50, 1, dtype=torch.float64)], 2)
    homogeneous[2] = 0
    stored = of_experts(homogeneous.mT @ homogeneous / 100, 100)
    assert stored["few"].tolist() == [0, 0, 1]
    pooled = (keys.mT @ keys).sum(0) / 100  # of each of the hundred tokens
    assert apart(stored["second_moment"][2].double(), pooled / 100) < 1e-6
    assert apart(stored["second_moment"][0].double(), keys[0].T @ keys[0] / 100) < 1e-6


def test_routing_tells_how_many_choices_are_as_they_were() -> None:
    arch = inspect_model(zoo.MIXTURES["mixtral"]())
    texts = [TOKENS[0].tolist(), TOKENS[1, :5].tolist()]
    before = choices(LayerRunner(arch), texts)
    assert {layer: chosen.shape for layer, chosen in before.items()} == dict.fromkeys(range(4), (17, 4))
    assert all((chosen.sum(1) == 2).all() for chosen in before.values())
    assert kept(before, choices(LayerRunner(arch), texts)) == 1
    with torch.no_grad():  # in the last layer, all tokens go to the first two experts
        router = arch.model.model.layers[3].mlp.gate  # type: ignore[union-attr, index]
        router.weight.zero_()
    after = choices(LayerRunner(arch), texts)
    assert all(torch.equal(after[layer], before[layer]) for layer in range(3))
    same = (before[3] & after[3]).sum() / before[3].sum()
    assert kept(before, after) == pytest.approx((3 + float(same)) / 4)
    assert float(same) < 1


# --- solving ----------------------------------------------------------------------------------------------------------

EXPERTS, WIDTH, OUT, FACTS = 5, 7, 6, 9


def stacked(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys (E·width, n) of facts that chose two experts each, residuals, earlier keys, second moments by block."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def keys(count: int) -> Tensor:
        chosen = torch.stack([torch.randperm(EXPERTS, generator=generator) < 2 for _ in range(count)], 1)
        return (random(EXPERTS, WIDTH, count) * chosen.unsqueeze(1)).flatten(0, 1)

    factors = random(EXPERTS, WIDTH, 3 * WIDTH)
    return keys(FACTS), random(OUT, FACTS), keys(4), factors @ factors.mT / (3 * WIDTH)


def problem(keys: Tensor, residual: Tensor, prior: Tensor, covariance: Covariance) -> LayerProblem:
    weight = torch.randn(OUT, len(keys), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    blocks = EXPERTS if isinstance(covariance, SideBySide) else 1
    return LayerProblem(keys, residual, covariance, PriorKeys(prior), lambda: weight, blocks=blocks)


def dense(moments: Tensor) -> Covariance:
    return Covariance(torch.block_diag(*moments), 100)


@pytest.mark.parametrize("name", ["memit", "emmet", "rome", "mose", "memit+nas", "memit+sphere", "memit+prune"])
def test_the_solve_is_that_of_the_one_wide_matrix(name: str) -> None:
    keys, residual, prior, moments = stacked()
    if name == "rome":
        keys, residual = keys[:, :1], residual[:, :1]
    method = get(name)
    config = method.config()
    found, wanted = (
        delta_of((method.solve(each, config),), each.read_base).dense()
        for each in (
            problem(keys, residual, prior, SideBySide(moments, 100)),
            problem(keys, residual, prior, dense(moments)),
        )
    )
    assert apart(found, wanted) < 1e-10


def projector(moments: Tensor, energy: float) -> Tensor:
    """Of each block's own null space, as one matrix."""
    found = []
    for each in moments:
        values, vectors = torch.linalg.eigh(each)
        basis = vectors[:, : int((values.cumsum(0) <= energy * values.sum()).sum())]
        found.append(basis @ basis.T)
    return torch.block_diag(*found)


def alphaedit(energy: float = 0.3) -> tuple[Tensor, Tensor]:
    """The update of the stacked solve, and AlphaEdit's eq. 14 written out for the concatenated matrix."""
    keys, residual, prior, moments = stacked()
    method = get("alphaedit")
    config = method.config(null_energy=energy)
    update = method.solve(problem(keys, residual, prior, SideBySide(moments, 100)), config)
    p = projector(moments, energy)
    l2 = config.ridge * (p @ torch.block_diag(*moments)).trace()  # type: ignore[attr-defined]
    gram = (prior @ prior.T + keys @ keys.T) @ p + l2 * torch.eye(len(keys), dtype=keys.dtype)
    return delta_of((update,), lambda: torch.empty(0)).dense(), residual @ keys.T @ p @ torch.linalg.inv(gram)


def test_alphaedit_projects_expert_by_expert() -> None:
    found, wanted = alphaedit()
    assert apart(found, wanted) < 1e-10


def test_block_descent_comes_to_the_same() -> None:
    """MoEEdit (arXiv 2602.10965) solves for one expert at a time, the others held: that comes to the closed form, and
    its four published passes fall short of it."""
    energy, (found, _) = 0.3, alphaedit()
    keys, residual, prior, moments = stacked()
    p, config = projector(moments, energy), get("alphaedit").config(null_energy=energy)
    l2 = config.ridge * (p @ torch.block_diag(*moments)).trace()  # type: ignore[attr-defined]
    every, target = torch.cat([keys, prior], 1), torch.cat([residual, 0 * residual[:, :4]], 1)
    delta = torch.zeros(OUT, EXPERTS * WIDTH, dtype=torch.float64)
    short = []
    for _ in range(400):
        for expert in range(EXPERTS):
            at = slice(expert * WIDTH, (expert + 1) * WIDTH)
            own = p[at, at] @ every[at]  # P k
            left = target - delta @ every + delta[:, at] @ every[at]
            gram = own.T @ own + l2 * torch.eye(own.shape[1], dtype=own.dtype)
            delta[:, at] = left @ torch.linalg.solve(gram, own.T)
        short.append(apart(delta, found))
    assert short[3] > 1e-4
    assert short[-1] < 1e-10


def test_mose_right_turns_each_experts_keys_by_themselves() -> None:
    from patchkit.editing.side_by_side import shares, solve_block_by_block

    keys, residual, prior, moments = stacked()
    keys, residual = keys[:, :1], 0.1 * residual[:, :1]
    method, one = get("mose-right"), problem(keys, residual, prior[:, :0], SideBySide(moments, 100))
    update = solve_block_by_block(method, method.config(), one)
    turns = dict(split(update, EXPERTS))
    weight = one.base_weight.unflatten(1, (EXPERTS, -1))
    assert shares(one).sum(0).sub(1).abs().max() < 1e-12
    assert len(turns) == 2  # the fact's experts
    whole = update.delta(one.base_weight).dense()
    for expert, turn in turns.items():
        assert isinstance(turn, Rotation)
        own = weight[:, expert] + turn.delta(weight[:, expert]).dense()
        assert torch.allclose(torch.linalg.svdvals(own), torch.linalg.svdvals(weight[:, expert]), atol=1e-10)
        assert apart(whole.unflatten(1, (EXPERTS, -1))[:, expert], own - weight[:, expert]) < 1e-10
    assert (residual - whole @ keys).norm() < 0.9 * residual.norm()


@pytest.mark.parametrize("kind", ["delta", "full", "sparse", "left"])
def test_an_update_of_all_is_those_of_each(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(OUT, 4, generator=generator), torch.randn(4, EXPERTS, WIDTH, generator=generator)
    right[:, 2] = 0
    wide = right.flatten(1)
    planes = torch.linalg.qr(left[:, :2])[0]
    update = {
        "delta": Delta(left, wide),
        "full": Full(left @ wide),
        "sparse": Sparse.of(left, wide.T),
        "left": Rotation("left", planes, torch.tensor([0.5])),
    }[kind]
    weight = torch.randn(OUT, EXPERTS * WIDTH, generator=generator)
    whole = delta_of((update,), lambda: weight).dense()
    blocks, every = weight.unflatten(1, (EXPERTS, -1)), split(update, EXPERTS)
    found = {block: delta_of((part,), partial(blocks.select, 1, block)) for block, part in every}
    assert set(found) == {0, 1, 3, 4} | ({2} if kind == "left" else set())
    assert apart(joined(found, EXPERTS).dense().to(whole), whole) < 1e-5


def test_a_change_is_kept_in_as_few_columns_as_it_has() -> None:
    generator = torch.Generator().manual_seed(2)
    left, core, right = (torch.randn(*shape, generator=generator) for shape in ((20, 3), (3, 12), (12, 3)))
    delta = Delta(left @ core, right @ torch.randn(3, 15, generator=generator))
    small = compact(delta)
    assert small.rank == 3
    assert apart(small.dense(), delta.dense()) < 1e-5
    assert compact(Delta(left, core)).rank == 3
