"""Second moments without all of their eigenvectors: the same edits, a bound on the error, kept for the next run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.maths import leading as module
from patchkit.maths.covariance import Covariance
from patchkit.maths.leading import Leading, leading, leading_of
from patchkit.maths.linalg import PriorKeys
from patchkit.maths.updates import delta_of
from patchkit.methods import LayerProblem, get
from patchkit.statistics.corpus import TextRecord
from patchkit.statistics.kept import KeptLeading
from patchkit.statistics.store import Origin, StatisticsStore
from tests.helpers import apart

D_IN, D_OUT = 768, 48
EXACT = 1e-4  # of an edit


def columns(rows: int, count: int, seed: int) -> Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def eigenpairs(decay: float = 1.0) -> tuple[Tensor, Tensor]:
    """Eigenvalues i^-decay, ascending, and random eigenvectors; the largest is far above the others, as in models."""
    values = torch.arange(D_IN, 0, -1, dtype=torch.float64) ** -decay
    values[-1] *= 3
    return values, torch.linalg.qr(columns(D_IN, D_IN, 1))[0]


@cache
def moments(decay: float = 1.0) -> Tensor:
    values, vectors = eigenpairs(decay)
    found = (vectors * values) @ vectors.T
    return (found + found.T) / 2


@pytest.mark.parametrize(("decay", "left", "most"), [(1.0, 0.5, 0.05), (1.0, 0.3, 0.07), (0.8, 0.4, 0.12)])
def test_the_leading_eigenvectors_are_those_of_a_full_decomposition(decay: float, left: float, most: float) -> None:
    """The last ones in a space of more than half of the size, which is still cheaper."""
    found, expected = leading(moments(decay), left), leading_of(*eigenpairs(decay), left)
    assert found is not None
    assert 1 < len(found.values) == len(expected.values) < most * D_IN
    assert apart(found.values, expected.values) < 1e-6
    assert found.rest == pytest.approx(expected.rest, rel=1e-9)
    off = found.vectors - expected.vectors @ (expected.vectors.T @ found.vectors)
    assert float(torch.linalg.matrix_norm(off, 2)) <= found.error + 1e-12  # the bound holds
    assert 0 < found.error <= module.TOLERANCE


def test_so_many_of_them_whatever_they_leave() -> None:
    found = leading(moments(), 0.0, 40)
    assert found is not None
    assert apart(found.values, eigenpairs()[0][-40:]) < 1e-6


def test_where_most_directions_are_needed_all_are_computed_and_little_is_lost_on_trying(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flat, grown, grow = moments(0.1), [], module._Krylov.grow
    monkeypatch.setattr(module._Krylov, "grow", lambda self: grown.append(self.block) or grow(self))
    assert leading(flat, 0.3) is None
    assert sum(grown) <= module.SHARE / module.FIRST_LOOK * D_IN + module.BLOCK
    assert Covariance(flat, 100).null_rank(0.3) == D_IN - len(leading_of(*eigenpairs(0.1), 0.3).values)


def test_equal_eigenvalues_at_the_border_end_all_the_same() -> None:
    values, vectors = eigenpairs()
    values = values.clone()
    values[-30:] = 1.0
    values[:-30] *= 1e-3
    found = leading((vectors * values) @ vectors.T, 0.5)
    assert found is None or len(found.values) <= 30


METHODS = {
    "alphaedit": {},
    "betaedit": {},
    "mose-right": {},
    "memit": {},
    "rome": {},
    "emmet": {},
    "encore": {},
    "memit+nullspace": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_edits_are_those_of_the_full_decomposition(name: str) -> None:
    method, keys = get(name), columns(D_IN, 1 if get(name).one_by_one else 6, 2)
    weight, known = columns(D_OUT, D_IN, 3) / D_IN**0.5, (eigenpairs()[0], eigenpairs()[1])
    problem = LayerProblem(keys, columns(D_OUT, keys.shape[1], 4), None, PriorKeys(columns(D_IN, 3, 5)), lambda: weight)
    made = []
    for covariance in (Covariance(moments().float(), 100), Covariance(moments(), 100, known)):
        update = method.solve(problem.replace(covariance=covariance), method.config())
        made.append(delta_of((update,), lambda: weight).dense())
    assert float(made[1].norm()) > 0
    assert apart(*made) < EXACT


def test_typical_keys_and_products_are_those_of_the_full_decomposition() -> None:
    ours, full = Covariance(moments(), 100), Covariance(moments(), 100, eigenpairs())
    keys, weight = columns(D_IN, 3, 2), columns(D_OUT, D_IN, 3)
    assert apart(ours.typical(keys, 1.0), full.typical(keys, 1.0)) < 1e-9
    assert apart(ours.times(weight), full.times(weight)) < 1e-9
    assert apart(ours.solve(keys, 1e-2), full.solve(keys, 1e-2)) < 1e-9


def test_solves_factor_without_eigenvectors_and_no_method_takes_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, eigh = [], torch.linalg.eigh

    def counted(matrix: Tensor, *more: Any) -> Any:
        sizes.append(len(matrix))
        return eigh(matrix, *more)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    covariance, keys = Covariance(moments(), 100), columns(D_IN, 3, 2)
    covariance.solve(keys, 1e-2)
    covariance.typical(keys, 1.0)
    assert not sizes
    covariance.project_null(keys, 0.3)
    assert max(sizes) <= module.SHARE * D_IN


def test_no_damping_at_all_is_solved_by_eigenvectors() -> None:
    """Rounding leaves eigenvalues below zero, for which there is no Cholesky factor."""
    text = columns(D_IN, 20, 6)
    covariance = Covariance((text @ text.T / 20).float(), 20)
    assert covariance.solve(columns(D_IN, 2, 2), 1e-9).isfinite().all()


# --- kept -------------------------------------------------------------------------------------------------------------


def kept(folder: Path) -> KeptLeading:
    text = TextRecord(source="t", sha256="0" * 64, tokens=100, window=32, token_ids="1" * 64)
    origin = Origin(kind="second_moments", weight="w", layer=1, model="m", dtype="float32", text=text)
    return KeptLeading(StatisticsStore(folder), origin)


def test_a_later_run_finds_what_an_earlier_one_computed_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = columns(D_IN, 3, 2)
    first = Covariance(moments(), 100, kept=kept(tmp_path)).project_null(keys, 0.3)
    (file,) = tmp_path.rglob("*.leading_eigenvectors-*")
    monkeypatch.setattr("patchkit.maths.covariance.leading", lambda *_: pytest.fail("computed again"))
    assert torch.equal(Covariance(moments(), 100, kept=kept(tmp_path)).project_null(keys, 0.3), first)
    monkeypatch.undo()
    again = Covariance(moments(), 100, kept=kept(tmp_path))
    assert again.null_rank(0.5) > again.null_rank(0.3)  # a share of energy each
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged; computed again"):
        assert torch.equal(Covariance(moments(), 100, kept=kept(tmp_path)).project_null(keys, 0.3), first)


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    covariance = Covariance(moments(), 100, kept=kept(tmp_path / "file" / "below"))
    assert covariance.null_rank(0.3) == replace(covariance, kept=None).null_rank(0.3)


def test_what_is_no_decomposition_is_not_taken(tmp_path: Path) -> None:
    store = kept(tmp_path)
    store.save(0.3, Leading(torch.ones(2, dtype=torch.float64), torch.ones(D_IN, 2, dtype=torch.float64), 1.0))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.load(0.3) is None
