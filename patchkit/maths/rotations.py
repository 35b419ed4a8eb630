"""Rotations kept as planes and angles, and the polar factor they come from: tensors in, tensors out.

A real orthogonal R with det R = 1 is normal, so its real Schur form is a set of plane rotations:
R = I + Q(T - I)Q' with Q (d, 2p) orthonormal and T block-diagonal, one 2x2 block per plane. Kept this way R is
orthogonal whatever planes are left out, its inverse is the negated angles, and (R - I)W has rank 2p.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import pi, sqrt
from typing import Literal

import torch
from torch import Tensor

from patchkit.maths.linalg import Delta

Side = Literal["left", "right"]

# Angles below this are rounding errors of the orthogonal matrix they were read from.
_SMALLEST_ANGLE = 1e-12


@dataclass(frozen=True)
class Rotation:
    """R = I + Q(T - I)Q' as an update of a weight: W' = R W on the left side, W' = W R on the right.

    planes: Q, (d, 2p); columns 2i and 2i+1 span plane i. Orthonormal to the precision of its dtype; every use
        orthonormalizes it again in float64 (`frame`), so that R is orthogonal to that precision however it was stored.
    angles: (p,), radians; u = Q[:, 2i] goes to cos(angle) u + sin(angle) v with v = Q[:, 2i+1].
    """

    side: Side
    planes: Tensor
    angles: Tensor

    @property
    def size(self) -> int:
        """d, the side of the square matrix R."""
        return self.planes.shape[0]

    @property
    def rank(self) -> int:
        """2p, the rank of R - I."""
        return self.planes.shape[1]

    @cached_property
    def frame(self) -> Tensor:
        """Q (d, 2p) in float64, orthonormal to machine precision."""
        return _orthonormal(self.planes.double())

    def _turn(self, coordinates: Tensor) -> Tensor:
        """(T - I) @ coordinates, (2p, n)."""
        angles = self.angles.double().unsqueeze(1)  # (p, 1)
        shrink, swing = -2 * (angles / 2).sin().square(), angles.sin()  # cos - 1 without cancellation
        first, second = coordinates[0::2], coordinates[1::2]  # (p, n) each
        turned = torch.stack([shrink * first - swing * second, swing * first + shrink * second], 1)  # (p, 2, n)
        return turned.reshape(coordinates.shape)  # (2p, n)

    def apply(self, columns: Tensor) -> Tensor:
        """R @ columns, (d, n), computed in float64 and returned in the dtype given."""
        exact = columns.double()
        return (exact + self.frame @ self._turn(self.frame.T @ exact)).to(columns.dtype)  # (d, n)

    def inverse(self) -> Rotation:
        """R' = R⁻¹: the same planes, turned back."""
        return replace(self, angles=-self.angles)

    def then(self, after: Rotation) -> Rotation:
        """This update followed by `after`, as one: R_after R on the left side, R R_after on the right.

        Only the joint span of the planes moves, so the Schur form is taken there, not in d dimensions.

        Raises:
            ValueError: the two act on different sides or sizes.
        """
        if (self.side, self.size) != (after.side, after.size):
            raise ValueError(
                f"cannot compose a {self.side} rotation of size {self.size} with a {after.side} one of {after.size}"
            )
        joint = torch.cat([self.frame, after.frame], 1)  # (d, 2p + 2q)
        # Householder QR gives orthonormal columns even where the two spans overlap.
        basis = torch.linalg.qr(joint)[0]  # (d, min(d, 2p + 2q))
        outer, inner = (after, self) if self.side == "left" else (self, after)
        product = basis.T @ outer.apply(inner.apply(basis))  # (m, m)
        return rotation_from(product, self.side, basis=basis)

    def truncated(self, tolerance: float) -> Rotation:
        """Without the planes that turn by less than `tolerance` radians; exactly orthogonal all the same."""
        return _select(self, (self.angles.abs() >= tolerance).nonzero().squeeze(1))

    def dense(self) -> Tensor:
        """R, (d, d), float64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64, device=self.planes.device))

    def delta(self, weight: Tensor) -> Delta:
        """What it adds to W (d_out, d_in): exactly of rank 2p, in float64.

        Left: (R - I)W = Q[(T - I)(Q'W)]. Right: W(R - I) = [(WQ)(T - I)]Q'.
        """
        exact = weight.double()
        if self.side == "left":
            return Delta(self.frame, self._turn(self.frame.T @ exact))
        back = self.inverse()._turn((exact @ self.frame).T)  # (T - I)'(WQ)', (2p, d_out)
        return Delta(back.T, self.frame.T)

    def spectrum(self) -> Tensor:
        """The angles turned by, (p,), descending, in radians."""
        return self.angles.abs().sort(descending=True).values

    def to(self, *args: object, **kwargs: object) -> Rotation:
        """Planes and angles through `Tensor.to`."""
        planes, angles = self.planes.to(*args, **kwargs), self.angles.to(*args, **kwargs)  # type: ignore[call-overload]
        return replace(self, planes=planes, angles=angles)


def rotation_from(
    matrix: Tensor, side: Side, tolerance: float = _SMALLEST_ANGLE, basis: Tensor | None = None
) -> Rotation:
    """Planes and angles of an orthogonal matrix, angles in (0, pi], largest first.

    The Cayley transform A = (R - I)(R + I)⁻¹ is skew, with eigenvalues ±i·tan(angle/2): monotone in the angle, so
    that eigenvectors mix only between equal angles, where mixing is harmless. Real and imaginary part of each
    eigenvector of the Hermitian -iA span a plane. It has a pole at pi, so angles beyond a right angle or so are read
    from -R.

    Args:
        matrix: R (d, d), or with `basis` B (d, m): G (m, m), and R = I + B(G - I)B'. Orthogonal, determinant 1.
        side: where R multiplies the weight.
        tolerance: planes that turn by less, in radians, are left out.
        basis: orthonormal columns.

    Raises:
        ValueError: the matrix is not orthogonal, or its determinant is -1 (it contains a reflection).
    """
    exact = matrix.double()
    _check_rotation(exact)
    cosines, vectors = torch.linalg.eigh((exact + exact.T) / 2)  # ascending: the largest angles first
    wide = _widest_gap(cosines, -0.9, 0.0)
    end = cosines.shape[0]
    if tolerance > 1e-6:  # cosines cannot tell smaller angles from zero
        end = _widest_gap(cosines, 1 - tolerance**2 / 2, 1 - tolerance**2 / 8)
    far, near = vectors[:, :wide], vectors[:, wide:end]  # invariant under R, both
    far_planes, far_angles = _schur_planes(-(far.T @ exact @ far), _SMALLEST_ANGLE)
    near_planes, near_angles = _schur_planes(near.T @ exact @ near, max(tolerance, _SMALLEST_ANGLE))
    flipped = torch.linalg.qr(far_planes, "complete")[0][:, far_planes.shape[1] :]  # (w, h): R is -1 here
    # A plane that -R turns by a, R turns by pi - a the other way round: its two columns change places.
    swapped = far_planes.unflatten(1, (-1, 2)).flip(2).flatten(1)  # (w, 2q)
    columns = torch.cat([far @ flipped, far @ swapped, near @ near_planes], 1)  # (m, 2p)
    half_turns = torch.full((flipped.shape[1] // 2,), pi, dtype=exact.dtype, device=exact.device)
    angles = torch.cat([half_turns, pi - far_angles, near_angles])  # (p,)
    planes = _orthonormal(columns if basis is None else basis.double() @ columns)  # (d, 2p)
    return _select(Rotation(side, planes, angles), angles.argsort(descending=True))


def polar(matrix: Tensor, steps: int = 40) -> Tensor:
    """The orthogonal polar factor U V' of M = U S V', the orthogonal matrix nearest to M, by matrix products alone.

    Newton-Schulz, X <- X(3I - X'X)/2, scaled while singular values are small (Chen and Chow, 2014): with all of them
    in [l, 1], stretching by sqrt(3 / (1 + l + l²)) first makes both ends of the interval come out equal, so that
    small ones grow 2.6-fold per step instead of 1.5-fold. The SVD takes over where M is too ill-conditioned for it.

    Args:
        matrix: M (n, n), not singular.
        steps: at most so many iterations.

    Returns:
        (n, n), in the dtype of M.
    """
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    target = 10 * torch.finfo(matrix.dtype).eps * sqrt(matrix.shape[0])
    bound = torch.linalg.matrix_norm(matrix.T @ matrix).sqrt()  # ||M'M||_F^(1/2), between ||M||_2 and n^(1/4) of it
    if not (bound > 0 and bound.isfinite()):
        return _polar_by_svd(matrix)
    iterate: Tensor = matrix / bound
    lower = 1e-6  # a wrong lower bound costs steps, not exactness
    for _ in range(steps):
        gram = iterate.T @ iterate  # (n, n)
        if torch.linalg.matrix_norm(gram - identity) < target:
            return iterate  # (n, n)
        stretch = sqrt(3 / (1 + lower + lower**2))
        iterate = (stretch / 2) * iterate @ (3 * identity - stretch**2 * gram)  # (n, n)
        lower = stretch * lower * (3 - (stretch * lower) ** 2) / 2
    return _polar_by_svd(matrix)


def procrustes(matrix: Tensor) -> Tensor:
    """The rotation R, det R = 1, with the largest tr(R'M): the minimizer of ||RA - B||_F for M = BA' (n, n).

    The polar factor, unless that contains a reflection; then the least singular direction is flipped, as in
    Kabsch's algorithm, since a reflection is no product of plane rotations.
    """
    if matrix.is_cuda:  # on a CPU the SVD is 3 to 9 times faster, as measured
        factor = polar(matrix)
        if torch.linalg.slogdet(factor).sign > 0:
            return factor
    left, _, right = torch.linalg.svd(matrix)
    if torch.linalg.slogdet(left).sign * torch.linalg.slogdet(right).sign < 0:
        left[:, -1] *= -1
    rotation: Tensor = left @ right  # (n, n)
    return rotation


def _polar_by_svd(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix)
    factor: Tensor = left @ right  # (n, n)
    return factor


def _select(rotation: Rotation, planes: Tensor) -> Rotation:
    """The planes of the indices given, in their order."""
    columns = torch.stack([2 * planes, 2 * planes + 1], 1).reshape(-1)  # (2q,)
    return replace(rotation, planes=rotation.planes[:, columns], angles=rotation.angles[planes])


def _check_rotation(matrix: Tensor) -> None:
    gap = matrix.T @ matrix - torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    error = float(torch.linalg.matrix_norm(gap)) / sqrt(max(1, matrix.shape[0]))
    if not error < 1e-5:
        raise ValueError(f"not an orthogonal matrix: R'R differs from I by {error:.1e} per column")
    if torch.linalg.slogdet(matrix).sign < 0:
        raise ValueError("the orthogonal matrix contains a reflection (determinant -1); take `procrustes`")


def _widest_gap(ascending: Tensor, low: float, high: float) -> int:
    """Where to cut the values in two: at the widest gap within [low, high]."""
    inside = ascending[(ascending > low) & (ascending < high)]
    edges = torch.cat([inside.new_tensor([low]), inside, inside.new_tensor([high])])
    return int((ascending <= low).sum()) + int(edges.diff().argmax())


def _schur_planes(matrix: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Planes (m, 2p) and angles (p,) over `smallest`, of an orthogonal G (m, m) without angles near pi."""
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    cayley = torch.linalg.solve(matrix + identity, matrix - identity)  # (m, m), skew
    tangents, vectors = torch.linalg.eigh(-0.5j * (cayley - cayley.T))  # tan(angle/2), in pairs of either sign
    angles = 2 * tangents.atan()
    kept = angles > smallest
    pairs = torch.stack([vectors.real, -vectors.imag], 2)[:, kept] * sqrt(2)  # (m, p, 2)
    return _orthonormal(pairs.flatten(1)), angles[kept]


def _orthonormal(columns: Tensor) -> Tensor:
    """The orthonormal columns nearest to these (d, m), which are so already but for rounding errors."""
    for _ in range(5):  # squares the error each time: enough from bfloat16's
        excess = columns.T @ columns - torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
        columns = columns - columns @ excess / 2
        if torch.linalg.matrix_norm(excess) < 1e-12:
            break
    return columns
