"""Scales that were folded into a weight before it was quantized.

AWQ (https://arxiv.org/abs/2306.00978, section 3.2) and SmoothQuant (https://arxiv.org/abs/2211.10438, eq. 3) multiply a
weight's columns with what they divide the rows of the layer before by. The model does the same as before, but its keys
are others, and so are the updates made for them. What the scales were is seen in the norms of rows and columns, which
rounding to a few bits leaves nearly as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchkit.maths.linalg import Delta

_SPREAD = 0.05
"""How far factors of norms are from 1, as the root mean square of their logarithms, where scales were folded in;
rounding to four bits leaves them within a hundredth. Each counts by its energy: small rows and columns may be rounded
to nothing, which is no scale."""
_ROUNDS, _CLOSE = 200, 1e-5
_LEAST = 1e-30


@dataclass(frozen=True)
class Folding:
    """W' = diag(rows) W diag(columns) but for rounding, W (d_out, d_in) being the weight before.

    rows: (d_out, 1). columns: (1, d_in).
    """

    rows: Tensor
    columns: Tensor

    def into(self, weight: Tensor) -> Tensor:
        """W' (d_out, d_in) for W, in its dtype."""
        return weight * self.rows.to(weight) * self.columns.to(weight)

    def out_of(self, delta: Delta) -> Delta:
        """The change of W that does what `delta` does to W'."""
        return Delta(delta.left / self.rows.to(delta.left), delta.right / self.columns.to(delta.right))

    def keys(self, keys: Tensor) -> Tensor:
        """What W multiplies with (d_in, n), where W' does with `keys`."""
        return keys * self.columns.T.to(keys)


PLAIN = Folding(torch.ones(1, 1), torch.ones(1, 1))
"""Nothing was folded in."""


def norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the rows (d_out, 1) and of the columns (d_in, 1) of a weight, in float32."""
    return weight.float().norm(dim=1)[:, None].cpu(), weight.float().norm(dim=0)[:, None].cpu()


def folding(weight: Tensor, row_norms: Tensor, column_norms: Tensor) -> Folding:
    """What was folded into `weight` (d_out, d_in) to give it such rows (d_out, 1) and columns (d_in, 1); `PLAIN` where
    they are its own but for rounding.

    By Sinkhorn and Knopp's iteration (1967, Pacific J. Math. 21) on squares: the factors of rows and of columns with
    which a matrix has given sums are unique, up to one number that goes from the ones to the others.
    """
    squares = weight.float().square().cpu()
    wanted_rows, wanted_columns = row_norms.float().square()[:, 0], column_norms.float().square()[:, 0]
    rows, columns = torch.ones_like(wanted_rows), torch.ones_like(wanted_columns)
    for _ in range(_ROUNDS):
        columns = _factors(wanted_columns, rows @ squares)
        before, rows = rows, _factors(wanted_rows, squares @ columns)
        if (rows / before - 1).abs().max() < _CLOSE:
            break
    mean = rows.log().mean().exp()
    rows, columns = (rows / mean).sqrt(), (columns * mean).sqrt()
    rows = rows if _spread(rows, wanted_rows) > _SPREAD else torch.ones_like(rows)
    columns = columns if _spread(columns, wanted_columns) > _SPREAD else torch.ones_like(columns)
    if bool((rows == 1).all()) and bool((columns == 1).all()):
        return PLAIN
    return Folding(rows[:, None], columns[None])


def _factors(wanted: Tensor, found: Tensor) -> Tensor:
    """1 where there is nothing to multiply, or nothing that comes of it."""
    return torch.where((wanted > 0) & (found > 0), wanted / found, 1.0)


def _spread(factors: Tensor, energy: Tensor) -> float:
    return float(((factors.log().square() * energy).sum() / energy.sum().clamp_min(_LEAST)).sqrt())
