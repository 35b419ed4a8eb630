"""Rotations as planes and angles: exact, whatever the angles, and exactly orthogonal whatever is cut."""

from __future__ import annotations

from math import pi

import pytest
import torch
from torch import Tensor

from patchkit.maths.rotations import Rotation, Side, polar, procrustes, rotation_from

SIZE = 24


def random_orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def random_rotation(size: int, seed: int) -> Tensor:
    matrix = random_orthogonal(size, seed)
    if torch.linalg.det(matrix) < 0:
        matrix[:, 0] *= -1
    return matrix


def turned_by(angles: list[float], size: int = SIZE, side: Side = "left", seed: int = 0) -> Rotation:
    planes = random_orthogonal(size, seed)[:, : 2 * len(angles)]
    return Rotation(side, planes, torch.tensor(angles, dtype=torch.float64))


def orthogonality(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.T @ matrix - torch.eye(matrix.shape[1], dtype=matrix.dtype)))


CASES = {
    "random": random_rotation(SIZE, 1),
    "odd size": random_rotation(SIZE + 1, 2),
    "identity": torch.eye(SIZE, dtype=torch.float64),
    "half turn everywhere": -torch.eye(SIZE, dtype=torch.float64),
    "one cluster": turned_by([0.7] * 6).dense(),
    "two clusters, one past a right angle": turned_by([2.5] * 4 + [0.3] * 5).dense(),
    "near clusters": turned_by([0.7, 0.7 + 1e-12, 0.7 + 1e-9, 0.7 + 1e-6]).dense(),
    "tiny beside large": turned_by([3.0, 1.0, 1e-3, 1e-6, 1e-9]).dense(),
    "near pi": turned_by([pi, pi - 1e-13, pi - 1e-9, pi - 1e-5, pi - 1e-2, 1.0, 1e-7]).dense(),
    "all around": turned_by([pi * (i + 1) / 12 for i in range(12)]).dense(),
    "right angles": turned_by([pi / 2] * 5 + [pi / 2 + 1e-10]).dense(),
    "where the spectrum is cut": turned_by([2.69, 2.6904, 2.691, 1.57, 1.58] * 2).dense(),
    "permutation": torch.eye(SIZE, dtype=torch.float64)[torch.arange(SIZE).roll(2)],
}


@pytest.mark.parametrize("name", CASES)
def test_an_orthogonal_matrix_comes_back_from_its_planes_and_angles(name: str) -> None:
    matrix = CASES[name]
    rotation = rotation_from(matrix, "left")
    torch.testing.assert_close(rotation.dense(), matrix, rtol=0, atol=2e-11)
    assert orthogonality(rotation.planes) < 1e-13
    assert ((rotation.angles > 0) & (rotation.angles <= pi)).all()
    assert torch.equal(rotation.angles, rotation.spectrum())


def test_the_angles_are_the_ones_put_in_and_nothing_else() -> None:
    angles = [3.1, 2.0, 0.5, 1e-4, 1e-8]
    found = rotation_from(turned_by(angles).dense(), "left", tolerance=1e-10)
    torch.testing.assert_close(found.angles, torch.tensor(angles, dtype=torch.float64), rtol=1e-6, atol=1e-14)
    assert found.rank == 10


def test_a_tolerance_leaves_planes_out_and_keeps_the_rest_exactly_orthogonal() -> None:
    whole = turned_by([1.0, 0.1, 0.01, 0.001])
    cut = rotation_from(whole.dense(), "left", tolerance=0.05)
    torch.testing.assert_close(cut.dense(), whole.truncated(0.05).dense(), rtol=0, atol=1e-12)
    assert cut.rank == 4
    assert orthogonality(cut.dense()) < 1e-13
    # A plane left out changes R by 2 sin(angle / 2) along it.
    assert torch.linalg.matrix_norm(whole.dense() - cut.dense(), 2) == pytest.approx(0.01, rel=1e-3)


def test_the_inverse_undoes_it_exactly() -> None:
    rotation = rotation_from(CASES["random"], "right")
    columns = torch.randn(SIZE, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.inverse().apply(rotation.apply(columns)), columns, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotation.inverse().dense(), rotation.dense().T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("second", [[0.4, 0.2], [3.0] * 7, [1.0] * 12], ids=["few", "overlapping", "all planes"])
def test_composition_equals_the_product_in_order(side: Side, second: list[float]) -> None:
    one, two = turned_by([2.0, 0.1, 0.03], side=side, seed=1), turned_by(second, side=side, seed=2)
    weight = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    stepwise = weight + one.delta(weight).dense()
    stepwise = stepwise + two.delta(stepwise).dense()
    torch.testing.assert_close(weight + one.then(two).delta(weight).dense(), stepwise, rtol=0, atol=1e-11)
    assert one.then(two).rank <= min(SIZE, one.rank + two.rank)


def test_undoing_by_composition_leaves_nothing() -> None:
    rotation = turned_by([2.0, 0.1])
    assert rotation.then(rotation.inverse()).truncated(1e-11).rank == 0


def test_composing_with_no_rotation_changes_nothing() -> None:
    rotation, nothing = turned_by([2.0, 0.1]), turned_by([])
    torch.testing.assert_close(nothing.then(rotation).dense(), rotation.dense(), rtol=0, atol=1e-13)
    assert nothing.then(nothing).rank == 0


def test_composition_refuses_another_side_or_size() -> None:
    with pytest.raises(ValueError, match="left rotation of size 24 with a right one"):
        turned_by([1.0]).then(turned_by([1.0], side="right"))
    with pytest.raises(ValueError, match="with a left one of 8"):
        turned_by([1.0]).then(turned_by([1.0], size=8))


def test_a_long_chain_stays_orthogonal() -> None:
    chain = turned_by([])
    for seed in range(40):
        chain = chain.then(turned_by([1.0, 0.1], seed=seed))
    assert orthogonality(chain.dense()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_in_less_precision_it_is_still_exactly_orthogonal(dtype: torch.dtype) -> None:
    exact = rotation_from(CASES["random"], "left")
    stored = exact.to(dtype)
    assert stored.planes.dtype == dtype
    assert orthogonality(stored.planes.double()) > 1e-9  # rounding alone does not keep it so
    assert orthogonality(stored.dense()) < 1e-13
    error = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(stored.dense(), exact.dense(), rtol=0, atol=error)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_delta_is_low_rank_and_keeps_every_singular_value(side: Side) -> None:
    weight = torch.randn(SIZE, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    rotation = turned_by([2.0, 0.5], size=SIZE if side == "left" else 40, side=side)
    delta = rotation.delta(weight)
    literal = rotation.dense() @ weight if side == "left" else weight @ rotation.dense()
    torch.testing.assert_close(weight + delta.dense(), literal, rtol=0, atol=1e-13)
    assert delta.rank == 4
    kept = torch.linalg.svdvals(weight + delta.dense())
    torch.testing.assert_close(kept, torch.linalg.svdvals(weight), rtol=1e-13, atol=0)


def test_columns_keep_their_dtype() -> None:
    assert turned_by([1.0]).apply(torch.ones(SIZE, 2)).dtype == torch.float32


def test_a_reflection_is_refused_and_no_orthogonal_matrix_too() -> None:
    mirror = torch.eye(4, dtype=torch.float64)
    mirror[0, 0] = -1
    with pytest.raises(ValueError, match="reflection"):
        rotation_from(mirror, "left")
    with pytest.raises(ValueError, match="not an orthogonal matrix"):
        rotation_from(2 * torch.eye(4), "left")


def test_planes_may_be_given_within_a_subspace() -> None:
    basis = random_orthogonal(SIZE, 5)[:, :6]
    small = random_rotation(6, 6)
    found = rotation_from(small, "right", basis=basis)
    expected = torch.eye(SIZE, dtype=torch.float64) + basis @ (small - torch.eye(6)) @ basis.T
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-13)
    assert found.rank <= 6


def matrix_of_condition(condition: float, size: int = 60) -> Tensor:
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return 3e4 * (random_orthogonal(size, 7) * values) @ random_orthogonal(size, 8).T


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_the_iteration_agrees_with_the_svd(condition: float) -> None:
    matrix = matrix_of_condition(condition)
    left, _, right = torch.linalg.svd(matrix)
    torch.testing.assert_close(polar(matrix), left @ right, rtol=0, atol=1e-10)
    assert orthogonality(polar(matrix)) < 1e-13


def test_the_svd_takes_over_where_the_iteration_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    singular = matrix_of_condition(10.0)
    singular[:, -1] = 0
    assert orthogonality(polar(singular)) < 1e-12
    assert orthogonality(polar(torch.zeros(5, 5))) == 0
    monkeypatch.setattr(torch.linalg, "svd", lambda *_: pytest.fail("needed no SVD"))
    polar(matrix_of_condition(1e4))


def test_the_iteration_works_in_float32() -> None:
    matrix = matrix_of_condition(1e2)
    torch.testing.assert_close(polar(matrix.float()).double(), polar(matrix), rtol=0, atol=1e-4)


def test_procrustes_mends_a_reflection_where_it_costs_least() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, -0.1], dtype=torch.float64))
    assert torch.linalg.det(polar(matrix)) < 0
    torch.testing.assert_close(procrustes(matrix), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_procrustes_finds_the_rotation_between_two_sets_of_columns() -> None:
    rotation = random_rotation(SIZE, 9)
    columns = torch.randn(SIZE, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    torch.testing.assert_close(procrustes(rotation @ columns @ columns.T), rotation, rtol=0, atol=1e-11)
