"""MOSE on either side: the laws of a rotation, the literal formulas, and what values may ask of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchkit import methods
from patchkit.maths.linalg import PriorKeys
from patchkit.maths.rotations import Rotation
from patchkit.methods import LayerProblem
from patchkit.methods.mose import MoseConfig, mose, on_spheres
from patchkit.methods.mose_right import MoseRightConfig, _Reach, mose_right, reach

from .test_methods import D_IN, D_OUT, apart, covariance_of, problem_of

SIDES = ["mose", "mose-right"]


def rotation_of(name: str, problem: LayerProblem) -> Rotation:
    chosen = methods.get(name)
    update = chosen.solve(problem, chosen.config())
    assert isinstance(update, Rotation)
    return update


def edited(name: str, problem: LayerProblem) -> Tensor:
    return problem.weight + rotation_of(name, problem).delta(problem.weight).dense()


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize(("facts", "prior"), [(1, 0), (5, 3), (5, D_IN), (D_IN + 4, 0)])
def test_norm_condition_number_and_every_singular_value_stay(name: str, facts: int, prior: int) -> None:
    problem = problem_of(facts, prior)
    matrix = rotation_of(name, problem).dense()
    assert apart(matrix.T @ matrix, torch.eye(len(matrix), dtype=torch.float64)) < 1e-14
    assert torch.linalg.det(matrix) > 0
    assert apart(torch.linalg.svdvals(edited(name, problem)), torch.linalg.svdvals(problem.weight)) < 1e-13
    assert apart(edited(name, problem), problem.weight) > 1e-3


@pytest.mark.parametrize("name", SIDES)
def test_merged_in_float32_norm_and_condition_number_hold_to_1e_5(name: str) -> None:
    problem = problem_of(5, 3)
    before = torch.linalg.svdvals(problem.weight.float().double())
    after = torch.linalg.svdvals(edited(name, problem).float().double())
    assert float(after.norm() / before.norm()) == pytest.approx(1, abs=1e-5)
    assert float(after[0] / after[-1]) == pytest.approx(float(before[0] / before[-1]), rel=1e-5)


@pytest.mark.parametrize("name", SIDES)
def test_earlier_keys_are_held(name: str) -> None:
    problem = problem_of(2, 3)
    forgetful = problem.replace(prior=PriorKeys(problem.prior_keys[:, :0]))
    moved = (edited(name, problem) - problem.weight) @ problem.prior_keys
    free = (edited(name, forgetful) - problem.weight) @ problem.prior_keys
    assert moved.norm() < 0.6 * free.norm()


def small(problem: LayerProblem, share: float = 0.2) -> LayerProblem:
    """The same problem with residuals that every rotation reaches."""
    return problem.replace(residual=share * problem.residual / problem.residual.norm(dim=0))


@pytest.mark.parametrize(("facts", "prior"), [(1, 0), (5, 0), (5, 3), (D_IN + 4, 7)])
def test_mose_equals_equations_17_to_20(facts: int, prior: int) -> None:
    """R = UV' from the SVD of M = BA' with the text's keys as columns, as the paper writes it."""
    problem, config = problem_of(facts, prior), MoseConfig(tolerance=1e-12)
    weight, keys = problem.weight, problem.keys
    values, vectors = torch.linalg.eigh(covariance_of(problem).matrix)
    text = vectors * values.clamp_min(0).sqrt()  # K0 with K0 K0' = C
    outputs = weight @ keys
    targets = outputs + problem.residual
    targets = targets / targets.norm(dim=0) * outputs.norm(dim=0)
    strength = config.preserve * outputs.norm() ** 2 / facts / (weight @ text).norm() ** 2
    before = torch.cat([strength.sqrt() * weight @ text, outputs, weight @ problem.prior_keys], 1)
    after = torch.cat([strength.sqrt() * weight @ text, targets, weight @ problem.prior_keys], 1)
    left, _, right = torch.linalg.svd(after @ before.T)
    assert torch.linalg.det(left @ right) > 0
    assert apart(mose(problem, config).dense(), left @ right) < 1e-9


def test_mose_meets_a_value_on_the_sphere_where_nothing_else_is_preserved() -> None:
    problem = problem_of(1, 0)
    held = on_spheres(problem, MoseConfig())(torch.arange(1), problem.residual.T, problem.residual.T).T
    given = mose(problem.replace(residual=held), MoseConfig(preserve=1e-9)).delta(problem.weight).dense() @ problem.keys
    assert apart(given, held) < 1e-6


def test_the_more_plain_text_is_preserved_the_less_it_moves() -> None:
    problem = problem_of(3, 0)
    text = covariance_of(problem).matrix
    moved = []
    for preserve in (0.1, 1.0, 10.0):
        change = mose(problem, MoseConfig(preserve=preserve)).delta(problem.weight).dense()
        moved.append(float((change @ text @ change.T).trace()))
    assert moved[0] > 1.5 * moved[1] > 3 * moved[2]


@pytest.mark.parametrize("sites", [1, 5])
def test_values_on_the_sphere_have_the_length_a_rotation_keeps(sites: int) -> None:
    problem = problem_of(3, 0).replace(sites=sites)
    outputs = (problem.weight @ problem.keys).T  # (n, d_out)
    delta = 30 * problem.residual.T
    held = on_spheres(problem, MoseConfig())(torch.arange(3), outputs, delta)
    torch.testing.assert_close((outputs + held / sites).norm(dim=1), outputs.norm(dim=1))
    alone = on_spheres(problem, MoseConfig())(torch.tensor([2]), outputs[2:], delta[2:])
    torch.testing.assert_close(alone[0], held[2])
    free = on_spheres(problem, MoseConfig(values="free"))(torch.arange(3), outputs, delta)
    assert torch.equal(free, delta)


@pytest.mark.parametrize("energy", [0.2, 0.5])
def test_a_right_rotation_meets_a_value_in_reach_exactly(energy: float) -> None:
    problem = small(problem_of(1, 0))
    config = MoseRightConfig(null_energy=energy, identity_weight=1e-9, tolerance=1e-9)
    moved = mose_right(problem, config).delta(problem.weight).dense() @ problem.keys
    through = problem.weight @ null_space(problem, energy)  # what of the residual the null space can give at all
    seen = through @ torch.linalg.pinv(through) @ problem.residual
    assert apart(moved, seen) < 1e-6


def null_space(problem: LayerProblem, energy: float) -> Tensor:
    """Orthonormal basis, from the singular vectors of C."""
    vectors, values, _ = torch.linalg.svd(covariance_of(problem).matrix)
    return vectors.flip(1)[:, values.flip(0).cumsum(0) <= energy * values.sum()]


@pytest.mark.parametrize(("facts", "prior"), [(1, 0), (5, 3), (D_IN + 4, 2)])
def test_a_right_rotation_is_the_identity_outside_the_null_space(facts: int, prior: int) -> None:
    problem, config = problem_of(facts, prior), MoseRightConfig(null_energy=0.3)
    basis = null_space(problem, 0.3)
    assert 0 < basis.shape[1] < D_IN
    matrix = mose_right(problem, config).dense()
    kept = torch.eye(D_IN, dtype=torch.float64) - basis @ basis.T
    assert apart(matrix @ kept, kept) < 1e-12
    assert apart(kept @ matrix, kept) < 1e-12


@pytest.mark.parametrize(("facts", "prior"), [(1, 0), (5, 0), (5, 3), (5, D_IN)])
def test_a_right_rotation_is_procrustes_over_the_whole_null_space(facts: int, prior: int) -> None:
    """The same minimizer from dense matrices, pseudo-inverses and an SVD, without the span of the keys."""
    problem, config = problem_of(facts, prior), MoseRightConfig(null_energy=0.8, tolerance=1e-12)
    basis = null_space(problem, 0.8)
    keys, earlier, weight = basis.T @ problem.keys, basis.T @ problem.prior_keys, problem.weight @ basis
    inverse = torch.linalg.pinv(weight)
    wanted = inverse @ (weight @ keys + problem.residual)
    idle = keys - inverse @ weight @ keys
    scale = (keys.norm(dim=0) / wanted.norm(dim=0)).clamp_max(1)
    room = (keys.norm(dim=0) ** 2 - wanted.norm(dim=0) ** 2).clamp_min(0).sqrt() / idle.norm(dim=0)
    target = wanted * scale + idle * room
    one = torch.eye(basis.shape[1], dtype=torch.float64)
    moment = target @ keys.T + config.earlier * earlier @ earlier.T
    left, _, right = torch.linalg.svd(moment + config.identity_weight * keys.square().sum() / facts * one)
    assert torch.linalg.det(left @ right) > 0
    expected = torch.eye(D_IN, dtype=torch.float64) + basis @ (left @ right - one) @ basis.T
    assert apart(mose_right(problem, config).dense(), expected) < 1e-9


def asked(problem: LayerProblem, length: float, sites: int) -> tuple[Tensor, Tensor]:
    """What `reach` makes of a delta of the given length in the direction of the residuals, (d_out, n) each."""
    delta = length * problem.residual
    constrain = reach(problem.replace(sites=sites), MoseRightConfig())
    return delta, constrain(torch.arange(delta.shape[1]), delta.T, delta.T).T


@pytest.mark.parametrize("length", [0.01, 1.0, 100.0])
def test_the_values_asked_for_are_the_ones_a_rotation_gives(length: float) -> None:
    problem = problem_of(1, 0)
    delta, held = asked(problem, length, sites=1)
    config = MoseRightConfig(identity_weight=1e-9, tolerance=1e-9)
    given = mose_right(problem.replace(residual=held), config).delta(problem.weight).dense() @ problem.keys
    assert apart(given, held) < 1e-5
    assert (apart(held, delta) > 0.05) == (length > 0.5)


def test_more_sites_reach_further() -> None:
    problem = problem_of(3, 0)
    one, five = asked(problem, 100.0, sites=1)[1], asked(problem, 100.0, sites=5)[1]
    assert (five.norm(dim=0) > 2 * one.norm(dim=0)).all()


def test_the_reach_is_differentiable_at_no_delta() -> None:
    problem = problem_of(3, 0)
    constrain = reach(problem, MoseRightConfig())
    delta = torch.zeros(3, D_OUT, requires_grad=True)
    held = constrain(torch.arange(3), torch.ones(3, D_OUT), delta)
    assert held.dtype == torch.float32
    torch.testing.assert_close(held, torch.zeros(3, D_OUT), rtol=0, atol=1e-5)
    assert torch.autograd.grad(held.square().sum() + held.sum(), delta)[0].isfinite().all()


def test_a_fact_keeps_its_own_reach_when_others_are_done() -> None:
    problem = problem_of(3, 0)
    _, held = asked(problem, 100.0, sites=1)
    constrain = reach(problem, MoseRightConfig())
    alone = constrain(torch.tensor([2]), problem.residual.T[2:], 100 * problem.residual.T[2:])
    torch.testing.assert_close(alone[0], held[:, 2])


def test_a_fact_that_an_expert_does_not_get_turns_none_of_its_keys() -> None:
    """Such a fact has no key there, and none is made for it."""
    size = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    key = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    at = _Reach(3, key, torch.eye(3, dtype=torch.float64), size)
    turned = at.turned(torch.tensor([[0.1, 0.0], [0.0, 0.0], [0.2, 0.0]], dtype=torch.float64))
    assert turned.isfinite().all()
    assert not turned[:, 1].any()
    assert turned[:, 0].norm() == pytest.approx(6**0.5)
