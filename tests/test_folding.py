"""Scales that were folded into a weight before it was rounded, seen in norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchkit.maths.folding import PLAIN, folding, norms
from patchkit.maths.linalg import Delta
from tests.helpers import apart

GROUP = 32


def rounded(weight: Tensor, bits: int) -> Tensor:
    """To whole multiples of a scale that each group of a row has."""
    groups, most = weight.unflatten(1, (-1, GROUP)), 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1, keepdim=True) / most).clamp_min(1e-9)
    return ((groups / scales).round() * scales).flatten(1)


@pytest.fixture
def weight() -> Tensor:
    """With rows and columns of different sizes, one of each zero."""
    draw = torch.Generator().manual_seed(0)
    made = torch.randn(96, 160, generator=draw) * torch.rand(96, 1, generator=draw) * torch.rand(160, generator=draw)
    made[5], made[:, 7] = 0, 0
    return made


@pytest.mark.parametrize(("bits", "off"), [(8, 0.01), (4, 0.06)])
def test_scales_come_back_from_norms(weight: Tensor, bits: int, off: float) -> None:
    draw = torch.Generator().manual_seed(1)
    rows, columns = (torch.exp(torch.randn(size, generator=draw) * 0.4) for size in ((96, 1), (1, 160)))
    found = folding(weight, *norms(rounded(weight * rows * columns, bits)))
    assert apart(found.into(weight), weight * rows * columns) < off
    change = Delta(torch.randn(96, 2, generator=draw), torch.randn(2, 160, generator=draw))
    keys = torch.randn(160, 3, generator=draw)
    assert apart(found.out_of(change).dense() @ found.keys(keys), (change.dense() @ keys) / found.rows) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_small_columns_that_rounding_has_lost_are_no_scale(weight: Tensor, bits: int) -> None:
    """An update was multiplied by ten there."""
    assert folding(weight, *norms(rounded(weight, bits))) is PLAIN


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rounding_alone_is_no_scale(weight: Tensor, bits: int) -> None:
    assert folding(weight, *norms(weight)) is PLAIN
    dense = torch.randn(96, 160, generator=torch.Generator().manual_seed(2))
    assert folding(dense, *norms(rounded(dense, bits))) is PLAIN
    assert apart(folding(dense, *norms(rounded(dense / 2, bits))).into(dense), dense / 2) < 0.05
