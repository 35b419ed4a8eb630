"""Every method keeps the contract, and each its own law, on random float64 matrices.

A method or wrapper is in the tables below by having its file in the folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import patchkit
from patchkit import methods
from patchkit.editing.recipe import load_recipe
from patchkit.errors import InputError
from patchkit.export.merge import merge
from patchkit.maths.covariance import Covariance
from patchkit.maths.linalg import Delta, PriorKeys
from patchkit.maths.updates import Full, Update, delta_of, kind_of, tensors_of
from patchkit.methods import Beside, LayerProblem, Loss
from patchkit.methods.adaedit import AdaEditConfig, adaedit
from patchkit.methods.alphaedit import AlphaEditConfig, alphaedit
from patchkit.methods.betaedit import BetaEditConfig
from patchkit.methods.crisp import FreeDirections
from patchkit.methods.encore import EncoreConfig
from patchkit.methods.memit import MemitConfig, memit
from patchkit.methods.mend import fresh
from patchkit.methods.nas import NasConfig
from patchkit.methods.oedit import OEditConfig, penalty
from patchkit.methods.oedit_plus import OEditPlusConfig, inside, rank_left
from patchkit.methods.prune import PruneConfig, damped
from patchkit.methods.rome import RomeConfig, rome
from patchkit.methods.sphere import principal_directions
from patchkit.methods.stableedit import whitened
from patchkit.patch.patch import Patch
from patchkit.statistics.corpus import PACKAGE_TEXT
from tests import zoo
from tests.helpers import apart, train_if_needed

D_OUT, D_IN = 12, 20
LIKE = fresh(D_IN, D_OUT, rank=4, seed=0)


def problem_of(facts: int = 5, prior: int = 3, tokens: int = 60) -> LayerProblem:
    """Random matrices; the text's keys have a spectrum that falls off, and earlier edits have left a change behind."""
    generator = torch.Generator().manual_seed(facts + 100 * prior)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    text = torch.linalg.qr(random(D_IN, D_IN)).Q @ (torch.logspace(-2, 0, D_IN)[:, None] * random(D_IN, tokens))
    covariance = Covariance(text @ text.T / tokens, tokens)
    weight, keys, residual = random(D_OUT, D_IN), random(D_IN, facts), random(D_OUT, facts)
    earlier = PriorKeys(random(D_IN, prior))
    gradient, outputs = torch.linalg.qr(random(D_OUT, 6)).Q, torch.logspace(-2, 0, D_OUT)[:, None] * random(D_OUT, 40)
    count = min(prior, 3)
    change = Delta(0.1 * random(D_OUT, count), random(count, D_IN)) if count else None
    network = {name: 0.1 * random(max(1, each.numel())).view(each.shape) for name, each in LIKE.items()}
    network["deviation"] = network["deviation"].abs() + 1
    beside = Beside(gradient, outputs @ outputs.T / 40, network)
    problem = LayerProblem(keys, residual, covariance, earlier, lambda: weight, lambda: change, beside)
    return asking(problem, keys, residual)


def asking(problem: LayerProblem, keys: Tensor, residual: Tensor) -> LayerProblem:
    """The same problem for other facts."""

    def loss(change: Update | None) -> tuple[float, Tensor]:
        missing = residual - (0 if change is None else dense(change, problem) @ keys)
        return float(missing.square().sum()) / 2, -missing @ keys.T

    given: Loss = loss
    return problem.replace(keys=keys, residual=residual, loss=given)


def covariance_of(problem: LayerProblem) -> Covariance:
    assert problem.covariance is not None
    return problem.covariance


def update_of(name: str, problem: LayerProblem, **settings: Any) -> Update:
    chosen = methods.get(name)
    return chosen.solve(problem, chosen.config(**settings))


def dense(update: Update, problem: LayerProblem) -> Tensor:
    """What the update comes to, (d_out, d_in)."""
    return delta_of((update,), lambda: problem.weight).dense()


def solve(name: str, problem: LayerProblem, **settings: Any) -> Tensor:
    """What the method changes the weight by, (d_out, d_in)."""
    return dense(update_of(name, problem, **settings), problem)


@pytest.fixture(autouse=True)
def _small_matrices_run_out_of_directions() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="O-Edit")
        yield


INNER = {True: "locft", False: "memit"}
WRAPPED = [f"{INNER[each.fits]}+{name}" for name, each in methods.wrappers().items()]
WRAPPED += ["emmet+nas+sphere", "adaedit+nullspace+rect+prune"]
NAMES = [*methods.available(), *WRAPPED]


def sizes(name: str) -> list[tuple[int, int]]:
    """(facts, earlier facts) a method is tried on; more than D_IN together takes another branch of the solve."""
    if methods.get(name).one_by_one:
        return [(1, 0), (1, 3)]
    return [(1, 0), (5, 0), (5, 3), (5, D_IN), (D_IN + 4, 0)]


TABLE = [(name, *size) for name in NAMES for size in sizes(name)]
BATCHED = [case for case in TABLE if case[1] > 1]


@pytest.mark.parametrize(("name", "facts", "prior"), TABLE)
def test_the_change_fits_the_weight_is_finite_and_comes_out_the_same_again(name: str, facts: int, prior: int) -> None:
    found = solve(name, problem_of(facts, prior))
    assert found.shape == (D_OUT, D_IN)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    # O-Edit+ may have no direction left at so small a size; that it then does nothing is its law.
    assert found.norm() > 0
    again = tensors_of(update_of(name, problem_of(facts, prior)))
    for part, tensor in tensors_of(update_of(name, problem_of(facts, prior))).items():
        assert torch.equal(tensor, again[part]), part


@pytest.mark.parametrize(("name", "facts", "prior"), TABLE)
def test_a_method_changes_nothing_it_is_given(name: str, facts: int, prior: int) -> None:
    problem, untouched = problem_of(facts, prior), problem_of(facts, prior)
    solve(name, problem)
    for field in ("weight", "base_weight", "keys", "residual", "prior_keys", "gradient"):
        assert torch.equal(getattr(problem, field), getattr(untouched, field)), field
    assert torch.equal(problem.earlier.dense(), untouched.earlier.dense())
    assert torch.equal(covariance_of(problem).matrix, covariance_of(untouched).matrix)
    for found, expected in zip(covariance_of(problem).eigh, covariance_of(untouched).eigh, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "facts", "prior"), BATCHED)
def test_the_order_of_facts_within_a_batch_does_not_matter(name: str, facts: int, prior: int) -> None:
    problem = problem_of(facts, prior)
    order = torch.randperm(facts, generator=torch.Generator().manual_seed(1))
    shuffled = asking(problem, problem.keys[:, order], problem.residual[:, order])
    assert not torch.equal(shuffled.keys, problem.keys)
    assert apart(solve(name, shuffled), solve(name, problem)) < 1e-9


@pytest.mark.parametrize(("name", "facts", "prior"), TABLE)
def test_nothing_to_change_gives_no_change(name: str, facts: int, prior: int) -> None:
    problem = problem_of(facts, prior)
    assert not solve(name, asking(problem, problem.keys, 0 * problem.residual)).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_method_writes_the_kind_of_update_it_declares(name: str) -> None:
    chosen = methods.get(name)
    found = kind_of(update_of(name, problem_of(*sizes(name)[-1])))
    assert found == chosen.update or (chosen.update == "sparse" and "+" in name)  # a projection fills a sparse one up


@pytest.mark.parametrize("chosen", [*methods.available().values(), *methods.wrappers().values()], ids=lambda c: c.name)
def test_every_method_says_what_it_is(chosen: methods.Method | methods.Wrapper) -> None:
    assert chosen in (methods.available().get(chosen.name), methods.wrappers().get(chosen.name))
    assert chosen.paper.startswith("https://")
    assert chosen.summary.endswith((".", "*."))
    assert all(text for text in (chosen.equations, chosen.use_when))


def test_every_method_and_wrapper_has_its_section_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    headings = {line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")}
    missing = {*methods.available(), *(f"+{name}" for name in methods.wrappers())} - headings
    assert not missing
    assert all(chosen.paper in text for chosen in (*methods.available().values(), *methods.wrappers().values()))


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r'unknown method "rom"; choose one of: .*rome'):
        methods.get("rom")
    with pytest.raises(InputError, match=r'unknown wrapper "nass" in method "memit\+nass"; choose one of: crisp, nas'):
        methods.get("memit+nass")


# --- in a patch -------------------------------------------------------------------------------------------------------

FACTS = [
    {"prompt": "the city of Rome", "subject": "Rome", "target_new": "capital"},
    {"prompt": "the friend of Ada Lovelace", "subject": "Ada Lovelace", "target_new": "is"},
]
QUICK = ("contexts=1", "value.steps=4", "layers=1-2", "batch_size=1")


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_of_any_method_is_saved_loaded_and_merged_unchanged(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(PACKAGE_TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    base = zoo.save(zoo.FAMILIES["llama"](), zoo.tiny_tokenizer(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    train_if_needed(model, name, FACTS, QUICK, text)
    made = patchkit.apply(model, zoo.tiny_tokenizer(), FACTS, name, overrides=QUICK, text=text)
    made.save(tmp_path / "patch")
    loaded = Patch.load(tmp_path / "patch")
    plain, wanted = logits(model), attached(model, made)
    assert (wanted - plain).abs().max() > 1e-4
    assert torch.equal(attached(model, loaded), wanted)
    assert torch.equal(logits(model), plain)
    merge([loaded], base, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(merged), wanted, atol=2e-4)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(4, 24)[None], use_cache=False).logits
    return found


def attached(model: Any, patch: Patch) -> Tensor:
    with patch.attached(model):
        return logits(model)


def test_a_wrapped_method_has_its_inner_ones_recipe_and_its_own_settings() -> None:
    config = load_recipe("rome+nas+prune", None, ["nas.anchor=7", "damping=0.5", "prune.variant=linear"])
    assert config.method == "rome+nas+prune"
    assert config.layers == load_recipe("rome").layers
    assert config.settings["nas"] == {"anchor": 7.0, "both_ways": False}
    assert (config.settings["prune"]["variant"], config.settings["damping"]) == ("linear", 0.5)
    with pytest.raises(InputError, match=r"unknown key"):
        load_recipe("rome+nas", None, ["nas.anker=7"])
    with pytest.raises(InputError, match=r"unknown key"):
        load_recipe("rome", None, ["nas.anchor=7"])


# --- each method's own law --------------------------------------------------------------------------------------------


def projector_of(problem: LayerProblem, energy: float) -> Tensor:
    """P of AlphaEdit eq. 9, from the singular vectors of C."""
    vectors, values, _ = torch.linalg.svd(covariance_of(problem).matrix)
    smallest = values.flip(0).cumsum(0) <= energy * values.sum()
    basis = vectors.flip(1)[:, smallest]
    assert 0 < basis.shape[1] < D_IN
    return basis @ basis.T


@pytest.mark.parametrize(("facts", "prior"), [(1, 0), (5, 0), (5, 3), (5, D_IN - 5), (5, D_IN - 4), (D_IN + 4, 7)])
@pytest.mark.parametrize("energy", [0.02, 0.3])
def test_alphaedit_equals_equation_14(facts: int, prior: int, energy: float) -> None:
    config, problem = AlphaEditConfig(null_energy=energy), problem_of(facts, prior)
    projector, keys, earlier = projector_of(problem, energy), problem.keys, problem.prior_keys
    l2 = config.ridge * (projector @ covariance_of(problem).matrix).trace()
    system = earlier @ earlier.T @ projector + keys @ keys.T @ projector + l2 * torch.eye(D_IN, dtype=torch.float64)
    expected = problem.residual @ keys.T @ projector @ torch.linalg.inv(system)
    assert apart(dense(alphaedit(problem, config), problem), expected) < 1e-10


@pytest.mark.parametrize("prior", [0, 3, D_IN])
def test_alphaedit_leaves_the_keys_outside_its_null_space_alone(prior: int) -> None:
    config, problem = AlphaEditConfig(), problem_of(5, prior)
    random = torch.randn(D_IN, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    preserved = random - projector_of(problem, config.null_energy) @ random
    delta = dense(alphaedit(problem, config), problem)
    assert (delta @ preserved).norm() < 1e-10 * delta.norm() * preserved.norm()
    assert (delta @ random).norm() > 1e-3 * delta.norm() * random.norm()


def test_alphaedit_does_nothing_where_there_is_no_null_space() -> None:
    flat = problem_of().replace(covariance=Covariance(torch.eye(D_IN, dtype=torch.float64), 100))
    assert not dense(alphaedit(flat, AlphaEditConfig(null_energy=0.01)), flat).any()


@pytest.mark.parametrize("name", ["alphaedit", "memit"])
def test_earlier_keys_move_less_once_they_are_given(name: str) -> None:
    problem = problem_of(5, 3)
    forgetful = problem.replace(prior=PriorKeys(problem.prior_keys[:, :0]))
    moved = solve(name, problem) @ problem.prior_keys
    assert moved.norm() < 0.5 * (solve(name, forgetful) @ problem.prior_keys).norm()


@pytest.mark.parametrize(("facts", "prior"), [(1, 0), (5, 0), (5, 3), (5, D_IN), (D_IN + 4, 7)])
@pytest.mark.parametrize("tokens", [60, 8])
def test_memit_satisfies_its_normal_equations(facts: int, prior: int, tokens: int) -> None:
    """Also where the text has fewer tokens than there are dimensions, so that C alone is singular."""
    config, problem = MemitConfig(), problem_of(facts, prior, tokens)
    matrix, keys, earlier = covariance_of(problem).matrix, problem.keys, problem.prior_keys
    damped = matrix + config.damping * matrix.trace() / D_IN * torch.eye(D_IN, dtype=torch.float64)
    system = config.preserve * damped + earlier @ earlier.T + keys @ keys.T
    assert apart(dense(memit(problem, config), problem) @ system, problem.residual @ keys.T) < 1e-10


@pytest.mark.parametrize("tokens", [60, 8])
def test_rome_meets_its_value_exactly(tokens: int) -> None:
    problem = problem_of(1, 0, tokens)
    value = problem.weight @ problem.keys + problem.residual
    delta = rome(problem, RomeConfig())
    assert isinstance(delta, Delta)
    assert delta.rank == 1
    assert apart((problem.weight + delta.dense()) @ problem.keys, value) < 1e-12


def test_rome_moves_plain_text_least_of_all_changes_that_meet_the_value() -> None:
    problem = problem_of(1, 0)
    delta = dense(rome(problem, RomeConfig(damping=1e-9)), problem)
    least_squares = problem.residual @ torch.linalg.pinv(problem.keys)
    matrix = covariance_of(problem).matrix
    assert apart(least_squares @ problem.keys, problem.residual) < 1e-10
    assert (delta @ matrix @ delta.T).trace() < 0.5 * (least_squares @ matrix @ least_squares.T).trace()


@pytest.mark.parametrize("name", ["alphaedit", "memit"])
def test_a_batch_method_moves_its_keys_toward_their_values(name: str) -> None:
    problem = problem_of(2, 0)
    missing = problem.residual - solve(name, problem) @ problem.keys
    assert missing.norm() < problem.residual.norm()


@pytest.mark.parametrize("facts", [1, 5, D_IN])
def test_emmet_meets_every_value_exactly_and_is_rome_for_one_fact(facts: int) -> None:
    problem = problem_of(facts, 3)
    value = problem.weight @ problem.keys + problem.residual
    found = solve("emmet", problem)
    assert apart((problem.weight + found) @ problem.keys, value) < 1e-7
    assert facts > 1 or apart(found, solve("rome", problem)) < 1e-12


def test_emmet_comes_as_near_as_it_can_where_two_facts_share_a_key() -> None:
    problem = problem_of(2, 0)
    twice = problem.replace(keys=problem.keys[:, [0, 0]])
    assert apart(solve("emmet", twice) @ twice.keys[:, :1], twice.residual.mean(1, keepdim=True)) < 1e-9


def test_r_rome_is_what_rome_does_here() -> None:
    problem = problem_of(1, 3)
    assert torch.equal(solve("r-rome", problem), solve("rome", problem))


# --- fine-tuning


@pytest.mark.parametrize("rank", [1, 3])
def test_locft_on_factors_fits_the_facts_with_the_rank_it_is_given(rank: int) -> None:
    problem = problem_of(rank, 0)
    found = update_of("locft-low-rank", problem, rank=rank, epochs=3000, stop_loss=1e-3)
    assert isinstance(found, Delta)
    assert found.rank == rank
    assert problem.loss is not None
    assert problem.loss(found)[0] < 1e-3 < problem.loss(None)[0]


def test_locft_takes_minibatches_in_an_order_that_its_seed_decides() -> None:
    problem = problem_of(4, 0)
    parts = [asking(problem, problem.keys[:, [i]], problem.residual[:, [i]]).loss for i in range(4)]
    split = problem.replace(part_losses=[part for part in parts if part])
    first, same, other = (solve("locft", split, epochs=2, order=order) for order in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def curved(problem: LayerProblem, change: Tensor) -> float:
    """tr(B Δ A Δ'), how much K-FAC has a change cost the text."""
    assert problem.beside.curvature is not None
    return float((problem.beside.curvature @ change @ covariance_of(problem).matrix * change).sum())


@pytest.mark.parametrize("energy", [0.5, 0.99])
def test_crisp_masks_the_fewest_pairs_that_hold_the_energy(energy: float) -> None:
    problem = problem_of()
    assert problem.beside.curvature is not None
    free = FreeDirections.of(covariance_of(problem), problem.beside.curvature, energy)
    whole = torch.kron(problem.beside.curvature, covariance_of(problem).matrix)  # K-FAC, of W's rows one after another
    values = torch.linalg.eigvalsh(whole).flip(0)
    masked = int((free.mask == 0).sum())
    assert values[:masked].sum() >= energy * values.sum() - 1e-9
    assert values[: masked - 1].sum() < energy * values.sum()
    random = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert apart(free.back(free.into(random)), random) < 1e-12


@pytest.mark.parametrize("inner", ["ft", "locft"])
def test_crisp_costs_the_text_less_and_still_fits_the_facts(inner: str) -> None:
    problem = problem_of(2, 0)
    assert problem.loss is not None
    settings = {"steps": 60, "bound": 9} if inner == "ft" else {"epochs": 60}
    plain = solve(inner, problem, **settings)
    kept = solve(f"{inner}+crisp", problem, crisp={"energy": 0.9}, **settings)
    published = solve(f"{inner}+crisp", problem, crisp={"energy": 0.9, "exact": False}, **settings)
    assert curved(problem, kept) < 0.3 * curved(problem, plain)
    assert curved(problem, published) > curved(problem, plain)
    assert problem.loss(Full(kept))[0] < 0.01 * problem.loss(None)[0]


@pytest.mark.parametrize("inner", ["ft", "locft"])
def test_crisp_that_is_exact_stays_within_the_free_directions(inner: str) -> None:
    problem = problem_of(3, 3)
    assert problem.beside.curvature is not None
    free = FreeDirections.of(covariance_of(problem), problem.beside.curvature, 0.9)
    for exact, within in ((True, True), (False, False)):
        found = free.into(solve(f"{inner}+crisp", problem, crisp={"energy": 0.9, "exact": exact}))
        assert (float((found * (1 - free.mask)).norm() / found.norm()) < 1e-12) == within


def test_crisp_goes_around_fine_tuning_alone() -> None:
    with pytest.raises(InputError, match=r'"memit" does not fit the loss by a whole matrix, so that "crisp" cannot'):
        methods.get("memit+crisp")
    with pytest.raises(InputError, match=r'"locft-low-rank" does not fit'):
        methods.get("locft-low-rank+crisp")
    with pytest.raises(InputError, match=r'"ft" has no solve, so that "nas" cannot go around it'):
        methods.get("ft+nas")


# --- AdaEdit


@pytest.mark.parametrize("over", ["alphaedit", "memit"])
@pytest.mark.parametrize(("facts", "prior"), [(1, 0), (5, 3), (D_IN + 4, 0)])
def test_adaedit_that_keeps_everything_is_the_method_underneath(over: str, facts: int, prior: int) -> None:
    problem = problem_of(facts, prior)
    whole = solve("adaedit", problem, rank=1, keep_left=1, keep_right=1, over=over)
    assert apart(whole, solve(over, problem)) < 1e-10


@pytest.mark.parametrize("over", ["alphaedit", "memit"])
def test_adaedit_keeps_the_largest_entries_of_the_leading_triplets_and_their_length(over: Any) -> None:
    problem = problem_of(5, 3)
    found = adaedit(problem, AdaEditConfig(rank=0.4, keep_left=0.25, keep_right=0.3, over=over)).delta()
    u, values, vt = torch.linalg.svd(solve(over, problem))
    for i in range(2):
        assert set(found.left[:, i].nonzero().view(-1).tolist()) == set(u[:, i].abs().topk(3).indices.tolist())
        assert set(found.right[i].nonzero().view(-1).tolist()) == set(vt[i].abs().topk(6).indices.tolist())
    assert torch.allclose(found.left.norm(dim=0), values[:2])
    assert torch.allclose(found.right.norm(dim=1), torch.ones(2, dtype=torch.float64))


# --- O-Edit and O-Edit+


@pytest.mark.parametrize("over", ["memit", "rome"])
def test_oedit_plus_is_orthogonal_to_earlier_changes_and_to_the_gradient(over: str) -> None:
    problem = problem_of(3, 3)
    assert problem.gradient is not None
    found = solve("oedit+", problem, over=over, gradient_rate=0.7, gradient_most=1)  # λ3·iteration = 0.7·6: 4 of 6
    earlier = problem.earlier.dense()
    assert (earlier.T @ found).norm() < 1e-10 * earlier.norm() * found.norm()
    assert (problem.gradient[:, :4].T @ found).norm() < 1e-10 * found.norm()
    assert (problem.gradient[:, 4:].T @ found).norm() > 1e-3 * found.norm()
    assert rank_left(problem, OEditPlusConfig(gradient_rate=0.7, gradient_most=1)) == D_OUT - 3 - 4 - 3


@pytest.mark.parametrize("name", ["oedit", "oedit+"])
@pytest.mark.parametrize(("over", "inner"), [("memit", "memit"), ("rome", "rome")])
def test_oedit_with_nothing_to_spare_is_the_method_underneath(name: str, over: str, inner: str) -> None:
    problem = problem_of(1, 0)
    assert apart(solve(name, problem, over=over, gradient_rate=0), solve(inner, problem)) < 1e-12


def test_oedit_plus_takes_only_what_is_left_of_a_gradient_inside_the_earlier_changes() -> None:
    """Eq. 12: a gradient direction that earlier edits went along does not cost a second direction."""
    problem = problem_of(1, 3)
    within = torch.linalg.qr(problem.earlier.dense() @ problem.keys).Q  # (d_out, 1)
    config = OEditPlusConfig(gradient_rate=1, gradient_most=1)
    assert rank_left(problem.replace(beside=Beside(within)), config) == D_OUT - 3 - 1


def test_oedit_plus_warns_before_it_runs_out_and_then_changes_nothing() -> None:
    problem = problem_of(1, 3)
    with pytest.warns(UserWarning, match=r"O-Edit\+ has 8 of 12 directions left for new facts; .*another method"):
        solve("oedit+", problem, gradient_rate=0, warn_below=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve("oedit+", problem, gradient_rate=0, warn_below=0.5)
    everything = problem.replace(read_earlier=lambda: Delta(torch.eye(D_OUT).double(), torch.eye(D_OUT, D_IN).double()))
    assert solve("oedit+", everything).norm() < 1e-10 * solve("memit", everything).norm()


@pytest.mark.parametrize("constrain_values", [True, False])
def test_oedit_plus_aims_values_where_the_projection_takes_nothing(constrain_values: bool) -> None:
    problem = problem_of(2, 3)
    config = OEditPlusConfig(constrain_values=constrain_values)
    delta = torch.randn(2, D_OUT, generator=torch.Generator().manual_seed(3))
    held = inside(problem, config)(torch.arange(2), torch.ones(2, D_OUT), delta)
    if not constrain_values:
        assert torch.equal(held, delta)
        return
    # What the projection leaves of a change toward the held value is all of it.
    toward = problem.replace(residual=held.T.double())
    assert apart(solve("oedit+", toward), solve("memit", toward)) < 1e-6
    assert held.norm() > 0.1 * delta.norm()


def test_oedit_asks_values_for_right_angles_whatever_the_sign() -> None:
    problem = problem_of(1, 3)
    assert problem.gradient is not None
    ask = penalty(problem, OEditConfig(orthogonality=4, gradient_rate=0.5, gradient_most=1))
    earlier = torch.linalg.svd(problem.earlier.dense()).U[:, :3]
    outside = problem.gradient[:, :2] - earlier @ (earlier.T @ problem.gradient[:, :2])
    gradient = torch.linalg.svd(outside, full_matrices=False).U
    start, delta = torch.ones(4, D_OUT), torch.randn(4, D_OUT, generator=torch.Generator().manual_seed(3))
    expected = sum(
        torch.nn.functional.cosine_similarity(delta[:, :, None], b[None], 1).abs().mean(1)
        for b in (earlier.float(), gradient.float())
    )
    found = ask(torch.arange(4), start, delta)
    assert torch.allclose(found, 4 * (torch.pi * D_OUT / 2) ** 0.5 * expected, rtol=1e-4)
    assert torch.allclose(ask(torch.arange(4), start, -delta), found)
    free = torch.linalg.svd(torch.cat([earlier, gradient], 1)).U[:, 5:].T.float()  # (7, d_out)
    assert ask(torch.arange(4), start, free[:4]).abs().max() < 1e-4


def test_oedits_penalty_can_be_differentiated_where_the_optimizer_starts() -> None:
    problem = problem_of(2, 3)
    delta = torch.zeros(2, D_OUT, requires_grad=True)
    penalty(problem, OEditConfig())(torch.arange(2), torch.ones(2, D_OUT), delta).sum().backward()
    assert delta.grad is not None
    assert delta.grad.isfinite().all()


# --- what goes around methods


def test_rect_keeps_the_entries_of_largest_relative_change_as_they_are() -> None:
    problem = problem_of(5, 3)
    inner, found = solve("memit", problem), solve("memit+rect", problem, rect={"keep": 0.25})
    kept = found != 0
    assert int(kept.sum()) == D_OUT * D_IN // 4
    assert torch.allclose(found[kept], inner[kept], rtol=1e-12)
    relative = (inner / problem.weight).abs()
    assert relative[kept].min() > relative[~kept].max()


@pytest.mark.parametrize("variant", ["log", "linear"])
def test_prune_bounds_the_singular_values_of_all_that_was_changed(variant: Any) -> None:
    problem = problem_of(5, 3)
    loud = problem.replace(residual=10 * problem.residual)
    config = PruneConfig(variant=variant, base=4)
    largest = float(torch.linalg.matrix_norm(problem.base_weight, 2))
    u, before, vt = torch.linalg.svd(loud.earlier.dense() + solve("memit", loud), full_matrices=False)
    assert before[0] > 2 * largest
    assert before[4] < largest
    wanted = torch.where(before > largest, damped(before, largest, config), before)
    total = loud.earlier.dense() + solve("memit+prune", loud, prune=config.model_dump())
    assert apart(total, u * wanted @ vt) < 1e-10
    by_hand = (
        (before[0] + largest) / 2
        if variant == "linear"
        else (before[0].log() - torch.tensor(largest).log()) / (torch.tensor(4.0).log()) + largest
    )
    assert torch.allclose(torch.linalg.svdvals(total)[0], by_hand.double(), rtol=1e-6)


def test_prune_lowers_the_condition_number_and_leaves_small_changes_alone() -> None:
    problem = problem_of(5, 3)
    loud = problem.replace(residual=200 * problem.residual)
    kept, plain = (problem.weight + solve(name, loud) for name in ("memit+prune", "memit"))
    assert torch.linalg.cond(kept) < 0.7 * torch.linalg.cond(plain)
    assert torch.equal(
        solve("memit+prune", problem.replace(residual=0.01 * problem.residual)),
        solve("memit", problem.replace(residual=0.01 * problem.residual)),
    )


def test_prunes_logarithm_never_enlarges() -> None:
    """As published it would, where the base's largest singular value is small."""
    values = torch.linspace(1, 9, 20, dtype=torch.float64)
    assert (damped(values, 0.5, PruneConfig()) <= values).all()


def test_nas_holds_values_to_the_anchor() -> None:
    problem = problem_of(5, 3)
    base = problem.base_weight
    mean = (base @ covariance_of(problem).matrix @ base.T).trace().sqrt()
    now = problem.weight @ problem.keys
    anchor = float(2 * now.norm(dim=0).max() / mean)
    loud = problem.replace(residual=30 * problem.residual)
    reached = now + solve("emmet+nas", loud, nas={"anchor": anchor}) @ problem.keys
    assert torch.allclose(reached.norm(dim=0), anchor * mean.expand(5), rtol=1e-6)
    wanted = now + loud.residual
    assert torch.allclose(torch.nn.functional.cosine_similarity(reached, wanted, 0), torch.ones(5).double())
    assert NasConfig().anchor > 0
    assert apart(solve("emmet+nas", problem, nas={"anchor": 1e9}), solve("emmet", problem)) < 1e-12


def test_sphere_attenuates_the_principal_directions_of_the_normalized_rows() -> None:
    problem = problem_of(5, 3)
    rows = problem.base_weight / problem.base_weight.norm(dim=1, keepdim=True)
    _, values, vt = torch.linalg.svd(rows)
    count = int((values.square().cumsum(0) <= 0.5 * D_OUT).sum()) + 1
    directions = principal_directions(problem.base_weight, 0.5)
    assert apart(directions @ directions.T, vt[:count].T @ vt[:count]) < 1e-10
    inner, found = solve("memit", problem), solve("memit+sphere", problem, sphere={"strength": 0.25})
    assert apart(found @ directions, 0.75 * inner @ directions) < 1e-10
    others = vt[count:].T
    assert apart(found @ others, inner @ others) < 1e-10


def test_sphere_takes_the_smaller_side_of_a_tall_weight_too() -> None:
    tall = torch.randn(9, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    directions = principal_directions(tall, 0.5)
    rows = tall / tall.norm(dim=1, keepdim=True)
    vt = torch.linalg.svd(rows).Vh[: directions.shape[1]]
    assert apart(directions @ directions.T, vt.T @ vt) < 1e-10


def test_nas_both_ways_gives_every_value_the_anchors_length_or_drops_it() -> None:
    """As the paper's third version does: up and down to m, and not at all over 2m."""
    problem = problem_of(3, 0).replace(prior=PriorKeys(torch.zeros(D_IN, 0, dtype=torch.float64)))
    m = float(((problem.base_weight @ covariance_of(problem).matrix) * problem.base_weight).sum().sqrt())
    now = problem.weight @ problem.keys
    wanted = torch.nn.functional.normalize(torch.ones_like(now), dim=0) * torch.tensor([0.5, 1.5, 2.5]) * m
    found: list[Tensor] = []

    def inner(changed: LayerProblem) -> Delta:
        found.append(now + changed.residual)
        return Delta(changed.residual, 0 * changed.keys.T)

    wrapper = methods.wrappers()["nas"]
    wrapper.around(problem.replace(residual=wanted - now), NasConfig(anchor=1.0, both_ways=True), inner)
    assert found[0][:, :2].norm(dim=0).tolist() == pytest.approx([m, m])
    assert apart(found[0][:, 2], now[:, 2]) < 1e-12


def test_the_null_space_projection_leaves_plain_texts_keys_alone() -> None:
    problem = problem_of(5, 3)
    projector = projector_of(problem, 0.3)
    assert apart(solve("memit+nullspace", problem), solve("memit", problem) @ projector) < 1e-10


def test_wrappers_act_from_the_inside_out() -> None:
    problem = problem_of(5, 3)
    projector = projector_of(problem, 0.3)
    directions = principal_directions(problem.base_weight, 0.5)
    attenuated = torch.eye(D_IN, dtype=torch.float64) - 0.5 * directions @ directions.T
    inner = solve("memit", problem)
    assert apart(solve("memit+nullspace+sphere", problem), inner @ projector @ attenuated) < 1e-10
    assert apart(solve("memit+sphere+nullspace", problem), inner @ attenuated @ projector) < 1e-10
    assert kind_of(update_of("memit+rect+sphere", problem)) == "full"


@pytest.mark.parametrize(("facts", "prior"), [(1, 0), (5, 3), (5, D_IN), (D_IN + 4, 7)])
def test_encore_satisfies_memits_normal_equations_with_a_ridge(facts: int, prior: int) -> None:
    config, problem = EncoreConfig(), problem_of(facts, prior)
    matrix, keys, earlier = covariance_of(problem).matrix, problem.keys, problem.prior_keys
    ridge = config.ridge * matrix.trace() / D_IN * torch.eye(D_IN, dtype=torch.float64)
    system = config.preserve * matrix + ridge + earlier @ earlier.T + keys @ keys.T
    assert apart(solve("encore", problem) @ system, problem.residual @ keys.T) < 1e-10
    assert solve("encore", problem, ridge=150.0).norm() < solve("encore", problem, ridge=1.0).norm()


@pytest.mark.parametrize(("facts", "prior"), [(1, 0), (5, 0), (5, 3), (5, D_IN), (D_IN + 4, 7)])
def test_betaedit_equals_its_equation_and_is_alphaedit_without_the_texts_term(facts: int, prior: int) -> None:
    """Δ' = (P(KK' + KpKp' + l1·C) + l2·I)⁻¹ P K R'."""
    config, problem = BetaEditConfig(), problem_of(facts, prior)
    matrix, keys, earlier = covariance_of(problem).matrix, problem.keys, problem.prior_keys
    projector = projector_of(problem, config.null_energy)
    l2 = config.ridge * (projector @ matrix).trace() * torch.eye(D_IN, dtype=torch.float64)
    system = projector @ (keys @ keys.T + earlier @ earlier.T + config.preserve * matrix) + l2
    expected = torch.linalg.solve(system, projector @ keys @ problem.residual.T).T
    assert apart(solve("betaedit", problem), expected) < 1e-9
    assert apart(solve("betaedit", problem, preserve=0.0), solve("alphaedit", problem)) < 1e-9


def test_stableedit_whitens_gradients_once_it_has_seen_enough() -> None:
    every = torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.diag(torch.tensor([1.0, 5.0, 0.1, 2.0], dtype=torch.float64)) @ every + 3
    white = whitened(every, every, 1e-6)
    assert apart(white @ white.T / (200 - 4 - 1), torch.eye(4, dtype=torch.float64)) < 1e-10
    assert white.mean(1).abs().max() < 1e-12
    few, many = problem_of(5, 0), problem_of(D_OUT + 2, 0)
    assert apart(solve("stableedit", few), solve("ultraedit", few)) < 1e-12
    assert apart(solve("stableedit", many), solve("ultraedit", many)) > 0.01


def test_pmet_is_memit_whose_residual_is_shared_by_the_root() -> None:
    problem = problem_of(5, 3)
    assert apart(solve("pmet", problem), solve("memit", problem)) < 1e-12
    chosen = methods.get("pmet")
    assert (chosen.spread, chosen.attention, chosen.value_at) == ("root", True, "module_out")


@pytest.mark.parametrize("over", ["alphaedit", "memit"])
def test_blue_is_the_method_underneath_at_each_end(over: str) -> None:
    problem = problem_of(5, 3)
    assert apart(solve("blue", problem, over=over), solve(over, problem)) < 1e-12
    assert methods.get("blue").ends_only


def test_locft_steps_through_minibatches_and_skips_those_that_are_done() -> None:
    """One that is met from the start is never stepped on; the other is brought below the bound."""
    problem = problem_of(4, 0)
    halves = [asking(problem, problem.keys[:, part], problem.residual[:, part]) for part in ([0, 1], [2, 3])]
    asked: list[int] = []

    def counting(place: int) -> Loss:
        def loss(change: Update | None) -> tuple[float, Tensor]:
            asked.append(place)
            own = halves[place].loss
            assert own is not None
            found, gradient = own(change)
            return (0.0 if place else found), gradient

        return loss

    parts = (counting(0), counting(1))
    found = solve("locft", problem.replace(part_losses=parts), epochs=400, rate=0.01, stop_loss=0.05)
    assert asked.count(0) == asked.count(1) > 10
    assert {tuple(asked[i : i + 2]) for i in range(0, len(asked), 2)} == {(0, 1), (1, 0)}  # in a new order each time
    missing = halves[0].residual - found @ halves[0].keys
    assert float(missing.square().sum()) / 2 < 0.1
    only_first = asking(problem, halves[0].keys, halves[0].residual)
    alone = solve("locft", only_first, epochs=400, rate=0.01, stop_loss=0.1)
    assert apart(found, alone) < 0.2  # nothing else was fitted
