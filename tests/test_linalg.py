"""Earlier edits' keys: what is kept of them between batches gives what all of them at once would give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from patchkit.maths.covariance import Covariance
from patchkit.maths.linalg import Damped, NullSpace, PriorKeys, SolveMetric, preserving_solve
from tests.helpers import apart

D_OUT, D_IN = 12, 20
METRICS: dict[str, Callable[[Covariance], SolveMetric]] = {
    "alphaedit": lambda covariance: NullSpace(covariance, 0.3, 0.2),
    "memit": lambda covariance: Damped(covariance, 1e-2, 150.0),
}


def columns(rows: int, count: int, seed: int) -> Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance_of(d_in: int = D_IN) -> Covariance:
    text = torch.logspace(-2, 0, d_in, dtype=torch.float64)[:, None] * columns(d_in, 3 * d_in, 1)
    return Covariance(text @ text.T / text.shape[1], text.shape[1])


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "batches", [[2], [1] * 9, [5] * 6, [3, D_IN + 5, 4], [D_IN - 1, 1, 1, 30], [2 * D_IN, 2], [4] * 100]
)
def test_every_batch_equals_the_dense_formula_with_all_earlier_keys(name: str, batches: list[int]) -> None:
    """Below and beyond d_in earlier keys, and where they cross it: R K'G(I + (KK' + KpKp')G)^-1, d_in x d_in."""
    metric, one = METRICS[name](covariance_of()), torch.eye(D_IN, dtype=torch.float64)
    matrix, prior = metric(one), PriorKeys(columns(D_IN, 3, 2))
    for i, size in enumerate(batches):
        keys, residual = columns(D_IN, size, 10 + i), columns(D_OUT, size, 300 + i)
        energy = keys @ keys.T + prior.matrix @ prior.matrix.T
        expected = residual @ keys.T @ matrix @ torch.linalg.inv(one + energy @ matrix)
        assert apart(preserving_solve(residual, keys, prior, metric).dense(), expected) < 1e-9
        prior = prior.extended(keys)
    assert prior.matrix.shape == (D_IN, len(prior)) == (D_IN, 3 + sum(batches))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("count", [7, 50])
def test_going_on_from_the_stored_keys_is_the_same(name: str, count: int) -> None:
    metric, keys = METRICS[name](covariance_of()), columns(D_IN, count, 3)
    prior = PriorKeys(keys[:, :0])
    for i in range(count):
        prior.inverse(metric)
        prior = prior.extended(keys[:, i : i + 1])
    assert torch.equal(prior.matrix, keys)
    asked = columns(D_IN, 4, 4)
    assert apart(prior.inverse(metric)(asked), PriorKeys(keys).inverse(metric)(asked)) < 1e-9


def test_earlier_keys_stay_as_they_were_when_more_are_added() -> None:
    """Two continuations of one state, another metric in between, and the state itself asked once more."""
    metric, other = (METRICS[name](covariance_of()) for name in METRICS)
    keys, asked = columns(D_IN, 5, 5), columns(D_IN, 4, 4)
    first = PriorKeys(columns(D_IN, 3, 2))
    before = first.inverse(metric)(asked)
    one, two = first.extended(keys[:, :2]), first.extended(keys[:, 2:])
    for longer in (one, two, one.extended(keys)):
        for chosen in (metric, other, metric):
            afresh = PriorKeys(longer.matrix).inverse(chosen)(asked)
            assert apart(longer.inverse(chosen)(asked), afresh) < 1e-9
    assert apart(first.inverse(metric)(asked), before) < 1e-9
    assert torch.equal(first.matrix, columns(D_IN, 3, 2))


@pytest.mark.parametrize("name", METRICS)
def test_a_batch_costs_the_same_however_many_came_before(name: str) -> None:
    """And nothing cubic in d_in, but once, where the keys become more than d_in."""
    metric, flops = METRICS[name](covariance_of(80)), []
    prior = PriorKeys(columns(80, 0, 0))
    for i in range(100):
        keys = columns(80, 10, i)
        with FlopCounterMode(display=False) as counter:
            preserving_solve(keys[:3], keys, prior, metric)
        flops.append(counter.get_total_flops())
        prior = prior.extended(keys)
    assert len(set(flops[10:])) == 1, "from d_in earlier keys on"
    assert max(flops[:8] + flops[10:]) < 16 * 10 * 80 * 80
